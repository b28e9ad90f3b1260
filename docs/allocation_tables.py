"""Table of docs/how-to/allocations.md from the results of `make run CONFIG=config/allocations.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from quantgrid.config import validation  # noqa: E402 (the library is in scripts/, not installed)
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.reporting.data import allocations, collection  # noqa: E402

HEAD = ("", "stored bits", "predicted", "measured", "best uniform scheme", "measured", "ratio", "difference, 95 %")


def table(plan: Plan) -> str:
    """Markdown: a row per allocated cell, with the best uniform cell within its budget on the same windows."""
    found = [collection.read_evaluations(plan.evaluations(study)) for study in plan.studies]
    lines = [f"| {' | '.join(HEAD)} |", f"| :-- | {' | '.join('--:' if name else ':--' for name in HEAD[1:])} |"]
    return "\n".join([*lines, *(row(line) for line in allocations.lines(plan.config, found))])


def row(line: dict[str, Any]) -> str:
    ratio = line["measured"] / line["uniform_measured"]
    entries = (
        f"{line['model']}, {line['recipe'].removesuffix(' mixed').removeprefix('no transform + ')}",
        f"{line['bits']:.3f}",
        f"{line['predicted']:.5f}",
        f"{line['measured']:.5f}",
        f"{line['uniform'].rpartition(', ')[2]}, {line['uniform_bits']:.3f} bits",
        f"{line['uniform_measured']:.5f}",
        f"{ratio:.2f}",
        f"{line['difference']}{'' if line['verdict'] == allocations.BETTER else ', ' + line['verdict']}",
    )
    return f"| {' | '.join(entries)} |".replace("-0.", "−0.")


if __name__ == "__main__":
    config = validation.load(sys.argv[1] if len(sys.argv) > 1 else ROOT / "config" / "allocations.yaml")
    print(table(Plan(config)))
