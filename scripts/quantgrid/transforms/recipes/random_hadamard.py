"""Random Hadamard rotations of SpinQuant (arXiv 2405.16406): R1 and R2 offline, R4 online.

No head mixing (see QuaRot), no subtraction of the embedding mean (it does not preserve the
function); norm gains are absorbed first. ``rotations`` selects them; ``basis`` lets R1 start from
principal axes (``rotate_principal.py``). ``residual: online`` applies R1 to the inputs that read the
residual stream instead (``rotate.py``). ``choose`` lists rotations that are applied only where they lower
the error of rounded outputs (``chosen_rotate.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...schemes.cell_schemes import CellSchemes
from ..primitives.chosen_rotate import ChosenDown, ChosenHeads
from ..primitives.rotate import RotateDown, RotateHeads, RotateResidual
from ..primitives.rotate_principal import RotatePrincipal


def primitives(
    seed: int,
    rotations: Sequence[str] = ("R1", "R2", "R4"),
    basis: str = "none",
    residual: str = "offline",
    values: str = "offline",
    choose: Sequence[str] = (),
    schemes: CellSchemes | None = None,
) -> list:
    online, turned = residual == "online", values == "online"
    R1 = (
        RotateResidual("hadamard", seed, online=online)
        if basis == "none"
        else RotatePrincipal("hadamard", seed, basis, online=online)
    )
    made = {
        "R1": R1,
        "R2": ChosenHeads(seed, schemes=schemes, online=turned) if "R2" in choose else RotateHeads(seed, online=turned),
        "R4": ChosenDown(schemes=schemes) if "R4" in choose else RotateDown(),
    }
    return [primitive for name, primitive in made.items() if name in rotations]
