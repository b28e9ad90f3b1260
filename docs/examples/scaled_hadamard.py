"""SmoothQuant scaling before the down projection, where no published recipe applies it, followed by
random Hadamard rotations.

Example of a new transform, added in three steps. Copy this file to
scripts/quantgrid/transforms/recipes/, add one line to TRANSFORMS in
scripts/quantgrid/config/transform_methods.py,

    "scaled_hadamard": Method("transforms.recipes.scaled_hadamard", "scaled down_input", calibrated=True, seeded=True),

and name it under ``transforms`` of a study in the config.
"""

from __future__ import annotations

from ..primitives.scale import Scale
from . import random_hadamard


def primitives(seed: int) -> list:
    return [Scale(0.5, ["down_input"]), *random_hadamard.primitives(seed)]
