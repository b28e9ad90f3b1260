"""Table of docs/reference/exports.md: the verdict of every target on every preset.

`python tests/export_table.py` writes it again, in a second."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from grid_cases import SHAPE  # noqa: E402
from quantgrid.exports.features import Features  # noqa: E402
from quantgrid.exports.targets import TARGETS, judge  # noqa: E402
from quantgrid.exports.verdicts import REFUSED, Verdict  # noqa: E402
from quantgrid.models.shapes import ModelShape  # noqa: E402
from quantgrid.schemes.cell_schemes import CellSchemes  # noqa: E402
from quantgrid.schemes.granularities import cell_schemes  # noqa: E402
from quantgrid.schemes.presets import PRESETS  # noqa: E402

DOCUMENT = ROOT / "docs" / "reference" / "exports.md"
GROUP = "group-64"
_ABOUT = f"""# Recipes and export targets

Written by `python tests/export_table.py` from the capability rules of the targets. Do not edit it by hand.

Rows are format presets on a dense Llama, at their block or in `{GROUP}`, without a transform and without
side terms. *Exact*: the loaders named compute what was measured. *Bound*: something is rounded
again, and the check of the export accepts a small divergence. *Refused*: something would be lost;
the reason names the nearest recipe that can be exported.
"""


def verdicts() -> dict[str, dict[str, Verdict]]:
    """Preset -> target -> verdict."""
    shape = ModelShape(**SHAPE)
    found = {}
    for preset in PRESETS:
        schemes = CellSchemes.from_dict(cell_schemes({"preset": preset}, GROUP, "table"))
        found[preset] = {target: judge(target, Features(shape, schemes)) for target in TARGETS}
    return found


def document() -> str:
    """The document: kinds at a glance, then loaders and reasons of each target."""
    found = verdicts()
    glance = _table(
        ["preset", *TARGETS], [[f"`{preset}`", *(v.kind for v in row.values())] for preset, row in found.items()]
    )
    parts = [_ABOUT, f"## At a glance\n\n{glance}"]
    for target in TARGETS:
        rows = [[f"`{preset}`", *_cells(row[target])] for preset, row in found.items()]
        parts.append(f"## {target}\n\n{_table(['preset', 'verdict', 'loaders', 'reasons'], rows)}")
    return "\n".join(parts)


def _cells(verdict: Verdict) -> list[str]:
    excluded = [] if verdict.kind == REFUSED else [f"not {loader}: {why}" for loader, why in verdict.excluded.items()]
    reasons = [*(verdict.refusals or verdict.bounds), *excluded]
    return [verdict.kind, ", ".join(verdict.loaders) or "-", "; ".join(reasons) or "-"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
