"""Learned equivalent scaling and weight clipping, layer by layer (OmniQuant, arXiv 2308.13137).

Scales s = exp(theta) at the two norm outputs and between v and o start at SmoothQuant's; clip
ratios are sigmoid(gamma) of every weight. The target of a layer is its full-precision output, on
inputs from the preceding rounded layers, with rounded weights and activations. Deviations: no shift
(the LLaMA code has none either), no scales between queries and keys (unless tied in rotary pairs
they change the function), no second target from rounded inputs, and ``error: relative`` weights all
tokens equally, unlike the paper. ``division: online`` divides at run time where no weights can take
the division.
"""

from __future__ import annotations

from ...inference.transform import Transform
from ...learning.network import Network
from ...learning.training import Learned, Settings, learn_by_layer
from ...learning.training_context import TrainingContext
from ...schemes.cell_schemes import CellSchemes
from ..primitives.learned import LearnedScale
from ..primitives.learned_clip import LearnedClip

SITES = ["attention_input", "mlp_input", "output_input"]


def primitives(schemes: CellSchemes, alpha: float, division: str = "offline", **_training: object) -> list:
    return [LearnedScale(alpha, SITES, online=division == "online"), *LearnedClip.of(schemes.weight)]


def learn(
    start: Transform,
    context: TrainingContext,
    schemes: CellSchemes,
    seed: int,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    clip_learning_rate: float,
    held_out: int,
    gradient: str,
    error: str,
    **_start: object,
) -> Learned:
    network = Network.at(context, start, schemes, round_weights=True, gradient=gradient)
    rates = {"positive": learning_rate, "fraction": clip_learning_rate}
    settings = Settings(steps if network.rounds else 0, batch_size, rates, schedule, seed)
    return learn_by_layer(start, network, settings, context, held_out, error, propagate=True)
