"""Learned rotations R1 and R2 (SpinQuant, arXiv 2405.16406); R4 stays a Hadamard transform.

Each is a fixed randomized Hadamard rotation times a learned one that starts as the identity, so the
initial transform is ``random_hadamard``. ``objective: end_to_end`` minimizes the loss of the
network with rounded activations; weights stay unrounded, as the paper advises before GPTQ (a cell
that rounds only weights is trained with rounded weights). ``layer_wise`` minimizes the output error
of every layer on full-precision inputs, at a fraction of the memory. The default gradient of the
rounding is that of a range computed at run time; ``gradient: identity`` is SpinQuant's
(``learning/straight_through.py``). Deviations: Riemannian Adam instead of Cayley SGD; the
layer-wise objective is not the paper's. ``objective: kurtosis`` (KurTail, arXiv 2503.01483) and ``whip``
(DartQuant, arXiv 2511.04063) are statistics of the rotated activations of stored tokens, without the
network (``learning/stored_activations.py``). ``residual: online`` applies R1, fixed and learned, to the
inputs that read the residual stream (``rotate.py``).
"""

from __future__ import annotations

from ...inference.linear import compute_device
from ...inference.transform import Transform
from ...learning.network import Network
from ...learning.objectives import AllLayers, EndToEnd
from ...learning.stored_activations import OBJECTIVES, StoredActivations
from ...learning.training import Learned, Settings, learn_together
from ...learning.training_context import TrainingContext
from ...schemes.cell_schemes import CellSchemes
from ..primitives.learned import LearnedR1, LearnedR2
from . import random_hadamard


def primitives(seed: int, residual: str = "offline", values: str = "offline", **_training: object) -> list:
    fixed = random_hadamard.primitives(seed, residual=residual, values=values)
    return [*fixed, LearnedR1(online=residual == "online"), LearnedR2(online=values == "online")]


def learn(
    start: Transform,
    context: TrainingContext,
    seed: int,
    objective: str,
    loss: str,
    top: int,
    round_weights: bool,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    held_out: int,
    gradient: str,
    schemes: CellSchemes | None = None,
    scale_learning_rate: float = 0.0,
    **_start: object,
) -> Learned:
    """Train R1 and R2 together; ``schemes`` for the objectives of the network, whose batches are windows. The
    batches of the others are layers.

    ``optimized_rotation_scaling`` uses this too, with ``scale_learning_rate`` for its scales.
    """
    if objective in OBJECTIVES:
        device = compute_device(context.device)
        settings = Settings(steps, batch_size, {"rotation": learning_rate}, schedule, seed)
        return learn_together(start, StoredActivations(start, context, objective, device), settings, context, device)
    network = Network.at(context, start, schemes, round_weights or not schemes.activation, gradient)
    rates = {"rotation": learning_rate, "positive": scale_learning_rate}
    settings = Settings(steps if network.rounds else 0, batch_size, rates, schedule, seed)
    wanted = EndToEnd(network, held_out, loss, top) if objective == "end_to_end" else AllLayers(network, held_out)
    return learn_together(start, wanted, settings, context, network.device)
