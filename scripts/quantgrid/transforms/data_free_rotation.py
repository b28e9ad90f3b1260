"""Rotations learned from the weights alone: R1 and R2 that make the fourth power of the folded weights small (or large). No tokens, no GPU.

Kurtosis as what makes a tensor hard to round: KURE (arXiv 2002.07686) lowers that of weights in training, KurTail (arXiv 2503.01483) learns
rotations by that of activations; the fourth power over the orthogonal group, maximized, is dictionary learning (arXiv 1906.02435). Taking it of
the weights, without data, is quantgrid's own variant of these. Rotations start as ``random_hadamard``, the learned parts as the identity.
"""

from __future__ import annotations

from ..learning.network import Folding
from ..learning.objectives import FourthPower
from ..learning.training import Learned, Settings, learn_together
from ..linear import compute_device
from ..workplace import Workplace
from .composition import Transform
from .optimized_rotation import primitives

__all__ = ["learn", "primitives"]


def learn(start: Transform, place: Workplace, seed: int, goal: str, steps: int, batch_size: int, schedule: str, learning_rate: float) -> Learned:
    """``batch_size`` counts layers."""
    device = compute_device(place.device)
    folding = Folding(place.model, start, device)
    objective = FourthPower(folding, 1.0 if goal == "minimize" else -1.0)
    return learn_together(start, objective, Settings(steps, batch_size, {"rotation": learning_rate}, schedule, seed), place, device)
