"""Rotations and channel scales learned together (OSTQuant, arXiv 2501.13987).

Norm outputs: R1 then 1/s; heads: 1/s per KV channel, then R2; down projection: 1/s, then the Hadamard transform R4. s = exp(theta) from 1, the
rotations as in ``optimized_rotation``, whose objectives serve here too; ``loss: kl_top`` is the paper's, ``cross_entropy`` that of arXiv 2507.17417.
``basis: weights``, the published code's default (``use_klt``), starts R1 and R2 from eigenvectors of the weights that read them, times random
Hadamard matrices; ``basis: none`` from the Hadamard matrices alone, as arXiv 2507.17417 does.
"""

from __future__ import annotations

from .learned import LearnedScale, TurnHeads, TurnResidual
from .optimized_rotation import learn
from .rotate import RotateDown, RotateHeads, RotateResidual
from .rotate_principal import RotateHeadsPrincipal, RotatePrincipal

__all__ = ["learn", "primitives"]


def primitives(seed: int, basis: str, **_training: object) -> list:
    residual = RotateResidual("hadamard", seed) if basis == "none" else RotatePrincipal("hadamard", seed, "weights")
    heads = RotateHeads(seed) if basis == "none" else RotateHeadsPrincipal(seed)
    rotations = [residual, LearnedScale(None, ["output_input", "down_input"]), heads, RotateDown()]
    return [*rotations, TurnResidual(), TurnHeads(), LearnedScale(None, ["attention_input", "mlp_input"])]
