"""Rotations R1 and R2 learned from the weights alone. No tokens, no GPU.

They minimize (or maximize) the fourth power of the folded weights. Kurtosis as a measure of
rounding difficulty: KURE (arXiv 2002.07686) lowers that of weights in training, KurTail (arXiv
2503.01483) learns rotations by that of activations; maximizing the fourth power over the orthogonal
group is dictionary learning (arXiv 1906.02435). The data-free variant on weights is quantgrid's.
Rotations start as ``random_hadamard``, the learned parts as the identity.
"""

from __future__ import annotations

from ...inference.linear import compute_device
from ...inference.transform import Transform
from ...learning.network import Folding
from ...learning.objectives import FourthPower
from ...learning.training import Learned, Settings, learn_together
from ...learning.training_context import TrainingContext
from .optimized_rotation import primitives

__all__ = ["learn", "primitives"]


def learn(
    start: Transform,
    context: TrainingContext,
    seed: int,
    goal: str,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    **_start: object,
) -> Learned:
    """Learn R1 and R2; ``batch_size`` counts layers."""
    device = compute_device(context.device)
    folding = Folding(context.model_folder, start, device)
    objective = FourthPower(folding, 1.0 if goal == "minimize" else -1.0)
    return learn_together(
        start, objective, Settings(steps, batch_size, {"rotation": learning_rate}, schedule, seed), context, device
    )
