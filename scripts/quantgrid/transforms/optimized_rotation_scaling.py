"""Rotations and channel scales learned together (OSTQuant, arXiv 2501.13987).

Norm outputs: R1 then 1/s; heads: 1/s per KV channel, then R2; down projection: 1/s, then the Hadamard transform R4. s = exp(theta) from 1, the
rotations as in ``optimized_rotation``, whose objectives serve here too; ``loss: kl_top`` is the paper's, ``cross_entropy`` that of arXiv 2507.17417.
Deviations: Adam on Cayley parameters in the place of Riemannian Adam; no start from eigenvectors.
"""

from __future__ import annotations

from .learned import LearnedScale, TurnHeads, TurnResidual
from .optimized_rotation import learn
from .rotate import RotateDown, RotateHeads, RotateResidual

__all__ = ["learn", "primitives"]


def primitives(seed: int, **_training: object) -> list:
    scales = LearnedScale(None, ["output_input", "down_input"])
    rotations = [RotateResidual("hadamard", seed), scales, RotateHeads(seed), RotateDown()]
    return [*rotations, TurnResidual(), TurnHeads(), LearnedScale(None, ["attention_input", "mlp_input"])]
