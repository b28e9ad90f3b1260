"""The unoptimized pair of arXiv 2507.17417: random Hadamard rotations, then SmoothQuant scaling of the rotated model.

The extremes of rotated activations are estimates from the token sample, whose size is the calibration's ``samples``. ``down_input`` cannot
be scaled: R4 stands there online.
"""

from __future__ import annotations

from . import random_hadamard
from .scale import Scale


def primitives(seed: int, alpha: float, sites: list[str], statistic: str) -> list:
    return [*random_hadamard.primitives(seed), Scale(alpha, sites, statistic)]
