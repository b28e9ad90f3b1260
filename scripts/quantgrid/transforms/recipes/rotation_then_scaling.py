"""Random Hadamard rotations, then SmoothQuant scaling: the unoptimized pair of arXiv 2507.17417.

The extremes of rotated activations are estimates from the token sample, whose size is the
calibration's ``samples``. ``down_input`` cannot be scaled, because R4 is online there. With
``residual: online`` the inputs that R1 rotates online are divided online as well.
"""

from __future__ import annotations

from ..primitives.scale import Scale
from . import random_hadamard


def primitives(
    seed: int, alpha: float, sites: list[str], statistic: str, residual: str = "offline", values: str = "offline"
) -> list:
    rotations = random_hadamard.primitives(seed, residual=residual, values=values)
    return [*rotations, Scale(alpha, sites, statistic, online="online" in (residual, values))]
