"""Random orthogonal rotations: R1 of the residual stream, drawn from the Haar measure instead of Hadamard matrices.

An example of a new transform. It becomes part of the grid by three steps: this file goes to scripts/quantgrid/transforms/, one line
goes into TRANSFORMS of scripts/quantgrid/registry.py,

    "random_orthogonal": Method("transforms.random_orthogonal", "Haar rotation of the residual stream", seeded=True),

and a study of the config names it under ``transforms``.
"""

from __future__ import annotations

from .rotate import RotateResidual


def primitives(seed: int) -> list[RotateResidual]:
    return [RotateResidual("orthogonal", seed)]
