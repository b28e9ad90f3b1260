"""FlatQuant (arXiv 2410.09426): learned Kronecker products, channel scales and weight clipping.

Trained layer by layer: x̃ = (x / s)(P1 ⊗ P2) at every site (no s at ``output_input``), s from
x_max^alpha / w_max^(1 - alpha), P = U diag(sigma) Vᵀ from random orthogonal U, V and sigma = 1. The
target of a layer is its full-precision output on full-precision inputs, with rounded weights and
activations. ``clip_activations`` clips ranges of inputs computed at run time too, by two learned
ratios per site (initially sigmoid(4)). Deviations: weights are clipped after the whole transform
(the paper clips before the transform of the values); ``error: relative`` weights all tokens
equally, unlike the paper; activations may be grouped. ``division: online`` divides at run time where
no weights can take the division.
"""

from __future__ import annotations

from ...inference.transform import Transform
from ...learning.network import Network
from ...learning.training import Learned, Settings, learn_by_layer
from ...learning.training_context import TrainingContext
from ...models.plans import SITES
from ...schemes.cell_schemes import CellSchemes
from ..primitives.affine import Affine
from ..primitives.learned import LearnedScale
from ..primitives.learned_clip import LearnedClip, LearnedInputClip

SCALED = ["attention_input", "mlp_input", "down_input"]


def primitives(
    schemes: CellSchemes,
    seed: int,
    alpha: float,
    clip_activations: bool,
    division: str = "offline",
    **_training: object,
) -> list:
    clips = [*LearnedClip.of(schemes.weight), *(LearnedInputClip.of(schemes) if clip_activations else [])]
    return [LearnedScale(alpha, SCALED, online=division == "online"), Affine(list(SITES), seed), *clips]


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
    rates = {"cayley": learning_rate, "positive": learning_rate, "fraction": clip_learning_rate}
    settings = Settings(steps if network.rounds else 0, batch_size, rates, schedule, seed)
    return learn_by_layer(start, network, settings, context, held_out, error, propagate=False)
