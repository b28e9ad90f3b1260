"""Table of docs/reference/exports.md: the verdict of every target on every preset.

`python tests/export_table.py` writes it again, in a second."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from grid_cases import SHAPE, config  # noqa: E402
from quantgrid.config.cells import Cell  # noqa: E402
from quantgrid.config.planned_features import planned_verdict  # noqa: E402
from quantgrid.exports.features import Features  # noqa: E402
from quantgrid.exports.targets import TARGETS, judge  # noqa: E402
from quantgrid.exports.verdicts import REFUSED, Verdict  # noqa: E402
from quantgrid.models.families import FAMILIES  # noqa: E402
from quantgrid.models.shapes import ModelShape  # noqa: E402
from quantgrid.schemes.cell_schemes import CellSchemes  # noqa: E402
from quantgrid.schemes.granularities import cell_schemes  # noqa: E402
from quantgrid.schemes.presets import PRESETS  # noqa: E402

DOCUMENT = ROOT / "docs" / "reference" / "exports.md"
GROUP = "group-64"
GRANULARITY = {
    "w8a8_served": "channel",
    "w4a4_served": "channel",
}  # of presets made for servers; else their block or GROUP
CHANNELS = ", ".join(f"`{preset}`" for preset in GRANULARITY)
_ABOUT = f"""# Recipes and export targets

Written by `python tests/export_table.py` from the capability rules of the targets. Do not edit it by hand.

Rows are format presets on a dense Llama, rounded to nearest without a transform: {CHANNELS} per
channel, the others at their block or in `{GROUP}`. *Exact*: the loaders named compute what was
measured. *Bound*: something is rounded again, and the check of the export accepts a small divergence.
*Refused*: something would be lost; the reason names the nearest recipe that can be exported.
"""
_FAMILIES = """## Architectures

`w4a16_g64` on every supported architecture, without a transform. Those that all targets refuse have LayerNorms, latent
attention, linear attention, or experts in one tensor, which no target writes yet.
"""


def verdicts() -> dict[str, dict[str, Verdict]]:
    """Preset -> target -> verdict."""
    cells = {preset: Cell("m", "none", "rtn", GRANULARITY.get(preset, GROUP), preset) for preset in PRESETS}
    return {
        preset: {target: planned_verdict(config(), cell, target) for target in TARGETS}
        for preset, cell in cells.items()
    }


def families() -> dict[tuple[str, ...], list[str]]:
    """Verdicts of the targets on `w4a16_g64` -> the architectures that have them."""
    schemes, found = CellSchemes.from_dict(cell_schemes({"preset": "w4a16_g64"}, GROUP, "table")), {}
    for architecture, family in FAMILIES.items():
        sizes = {"experts": 8, "active_experts": 2, "expert_size": 64, "shared_size": 64} if family.experts else {}
        features = Features(ModelShape(**{**SHAPE, **sizes, "architecture": architecture}), schemes)
        found.setdefault(tuple(judge(target, features).kind for target in TARGETS), []).append(architecture)
    return found


def document() -> str:
    """The document: kinds at a glance, architectures, then loaders and reasons of each target."""
    found = verdicts()
    glance = _table(
        ["preset", *TARGETS], [[f"`{preset}`", *(v.kind for v in row.values())] for preset, row in found.items()]
    )
    architectures = _table(
        [*TARGETS, "architectures"],
        [
            [*kinds, ", ".join(f"`{name.removesuffix('ForCausalLM')}`" for name in names)]
            for kinds, names in families().items()
        ],
    )
    parts = [_ABOUT, f"## At a glance\n\n{glance}", f"{_FAMILIES}\n{architectures}"]
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
