"""Rotations and channel scales learned together (OSTQuant, arXiv 2501.13987).

Norm outputs: R1 then 1/s; heads: 1/s per KV channel, then R2; down projection: 1/s, then the
Hadamard transform R4. s = exp(theta) from 1; rotations and objectives as in ``optimized_rotation``.
``loss: kl_top`` is the paper's, ``cross_entropy`` that of arXiv 2507.17417. ``basis: weights``, the
default of the published code (``use_klt``), starts R1 and R2 from eigenvectors of the weights that
read them, times random Hadamard matrices; ``basis: none`` starts from the Hadamard matrices alone,
as arXiv 2507.17417 does. ``residual: online`` applies R1, and 1/s behind it, to the inputs that read
the residual stream (``rotate.py``).
"""

from __future__ import annotations

from ..primitives.learned import LearnedR1, LearnedR2, LearnedScale
from ..primitives.rotate import RotateDown, RotateHeads, RotateResidual
from ..primitives.rotate_principal import RotateHeadsPrincipal, RotatePrincipal
from .optimized_rotation import learn

__all__ = ["learn", "primitives"]


def primitives(seed: int, basis: str, residual: str = "offline", values: str = "offline", **_training: object) -> list:
    online, turned = residual == "online", values == "online"
    R1 = (
        RotateResidual("hadamard", seed, online=online)
        if basis == "none"
        else RotatePrincipal("hadamard", seed, "weights", online=online)
    )
    heads = RotateHeads(seed, online=turned) if basis == "none" else RotateHeadsPrincipal(seed, online=turned)
    rotations = [R1, LearnedScale(None, ["output_input", "down_input"], online=online), heads, RotateDown()]
    scale = LearnedScale(None, ["attention_input", "mlp_input"], online=online)
    return [*rotations, LearnedR1(online=online), LearnedR2(online=turned), scale]
