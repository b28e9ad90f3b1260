"""Learned equivalent scaling and weight clipping, layer by layer (OmniQuant, arXiv 2308.13137).

Scales s = exp(theta) at the two norm outputs and between v and o, from SmoothQuant's; clip ratios sigmoid(gamma) of every weight. A layer
is trained to give its full-precision output from what the rounded layers before it give, weights and activations rounded.
Deviations: no shift (the LLaMA code has none either), no scales between queries and keys (without pairs of rotary channels
they change the function), no second target from rounded inputs, and ``error: relative`` weighs every token alike, which the paper does not.
"""

from __future__ import annotations

from ..cell_schemes import CellSchemes
from ..learning.network import Network
from ..learning.training import Learned, Settings, learn_by_layer
from ..workplace import Workplace
from .composition import Transform
from .learned import LearnedScale
from .learned_clip import LearnedClip

SITES = ["attention_input", "mlp_input", "output_input"]


def primitives(schemes: CellSchemes, alpha: float, **_training: object) -> list:
    return [LearnedScale(alpha, SITES), *LearnedClip.of(schemes.weight)]


def learn(start: Transform, place: Workplace, schemes: CellSchemes, seed: int, steps: int, batch_size: int, schedule: str, learning_rate: float,
          clip_learning_rate: float, held_out: int, gradient: str, error: str, **_start: object) -> Learned:
    network = Network.at(place, start, schemes, round_weights=True, gradient=gradient)
    rates = {"positive": learning_rate, "fraction": clip_learning_rate}
    settings = Settings(steps if network.rounds else 0, batch_size, rates, schedule, seed)
    return learn_by_layer(start, network, settings, place, held_out, error, propagate=True)
