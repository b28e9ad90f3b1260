"""SmoothQuant's scaling where no published recipe has it, before the down projection, followed by random Hadamard rotations.

An example of a new transform. It becomes part of the grid by three steps: this file goes to scripts/quantgrid/transforms/, one line
goes into TRANSFORMS of scripts/quantgrid/registry.py,

    "scaled_hadamard": Method("transforms.scaled_hadamard", "scaled down_input, then rotations", calibrated=True, seeded=True),

and a study of the config names it under ``transforms``.
"""

from __future__ import annotations

from . import random_hadamard
from .scale import Scale


def primitives(seed: int) -> list:
    return [Scale(0.5, ["down_input"]), *random_hadamard.primitives(seed)]
