"""Learned rotations (SpinQuant, arXiv 2405.16406): R1 of the residual stream, R2 of every KV head; R4 stays a Hadamard transform.

Each is a fixed randomized Hadamard rotation times a learned one that starts as the identity, so that the start is ``random_hadamard``.
``objective: end_to_end`` minimizes the loss of the network with rounded activations, weights unrounded as the paper advises where GPTQ
follows (a cell that rounds weights alone is trained with rounded weights); ``layer_wise`` the error of every layer's output on
full-precision inputs, at a fraction of the memory.
The gradient of the rounding is by default that of a range found at run time; ``gradient: identity`` is SpinQuant's
(``learning/straight_through.py``).
Deviations: Riemannian Adam in the place of Cayley SGD; the layer-wise objective is not the paper's.
"""

from __future__ import annotations

from ..cell_schemes import CellSchemes
from ..learning.network import Network
from ..learning.objectives import AllLayers, EndToEnd
from ..learning.training import Learned, Settings, learn_together
from ..workplace import Workplace
from . import random_hadamard
from .composition import Transform
from .learned import TurnHeads, TurnResidual


def primitives(seed: int, **_training: object) -> list:
    return [*random_hadamard.primitives(seed), TurnResidual(), TurnHeads()]


def learn(start: Transform, place: Workplace, schemes: CellSchemes, seed: int, objective: str, loss: str, top: int, round_weights: bool, steps: int,
          batch_size: int, schedule: str, learning_rate: float, held_out: int, gradient: str, scale_learning_rate: float = 0.0,
          **_start: object) -> Learned:
    """Train R1 and R2 together; ``optimized_rotation_scaling`` is trained in the same way, with ``scale_learning_rate`` for its scales."""
    network = Network.at(place, start, schemes, round_weights or not schemes.activation, gradient)
    rates = {"rotation": learning_rate, "positive": scale_learning_rate}
    settings = Settings(steps if network.rounds else 0, batch_size, rates, schedule, seed)
    wanted = EndToEnd(network, held_out, loss, top) if objective == "end_to_end" else AllLayers(network, held_out)
    return learn_together(start, wanted, settings, place, network.device)
