"""Learned Kronecker products, channel scales and weight clipping, layer by layer (FlatQuant, arXiv 2410.09426).

x̃ = (x / s)(P1 ⊗ P2) at every site (no s at ``output_input``), s from x_max^alpha / w_max^(1 - alpha), P = U diag(sigma) Vᵀ from random orthogonal
U, V and sigma = 1. A layer is trained to give its full-precision output from full-precision inputs, weights and activations rounded.
``clip_activations``: the ranges of inputs that are found at run time are clipped too, by two learned ratios per site (sigmoid(4) at the start).
Deviations: weights are clipped after the whole transform (the paper clips before the turn of the values); ``error: relative`` weighs every
token alike, which the paper does not; activations may be grouped.
"""

from __future__ import annotations

from ..architecture import SITES
from ..cell_schemes import CellSchemes
from ..learning.network import Network
from ..learning.training import Learned, Settings, learn_by_layer
from ..workplace import Workplace
from .affine import Affine
from .composition import Transform
from .learned import LearnedScale
from .learned_clip import LearnedClip, LearnedInputClip

SCALED = ["attention_input", "mlp_input", "down_input"]


def primitives(schemes: CellSchemes, seed: int, alpha: float, clip_activations: bool, **_training: object) -> list:
    clips = [*LearnedClip.of(schemes.weight), *(LearnedInputClip.of(schemes) if clip_activations else [])]
    return [LearnedScale(alpha, SCALED), Affine(list(SITES), seed), *clips]


def learn(start: Transform, place: Workplace, schemes: CellSchemes, seed: int, steps: int, batch_size: int, schedule: str, learning_rate: float,
          clip_learning_rate: float, held_out: int, gradient: str, error: str, **_start: object) -> Learned:
    network = Network.at(place, start, schemes, round_weights=True, gradient=gradient)
    rates = {"cayley": learning_rate, "positive": learning_rate, "fraction": clip_learning_rate}
    settings = Settings(steps if network.rounds else 0, batch_size, rates, schedule, seed)
    return learn_by_layer(start, network, settings, place, held_out, error, propagate=False)
