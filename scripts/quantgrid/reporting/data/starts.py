"""Marks of cells whose training kept its start, and lines that count the affected parts (see
``quantgrid/learning/outcomes.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..style import value_label
from .records import AXES, tidy

MARK, WORDS = "‡", "start kept"
MEANING = "the training ended no lower than it began, so the cell is what it started from"
LEGEND = f"{MARK}: {WORDS} ({MEANING})."
HOLLOW = f"Hollow: {WORDS} ({MEANING})."


def kept(records: pd.DataFrame) -> set[str]:
    """Find the cells of which a training kept its start in all parts; none in records of a version
    that did not record it."""
    return set(records.cell[records.start_kept == "all"]) if "start_kept" in records else set()


def marked(text: str, start_kept: bool) -> str:
    return f"{text} {MARK}" if start_kept else text


def noted(note: str, start_kept: pd.DataFrame) -> str:
    """Append the meaning of the mark to the ``note`` of a table that contains it."""
    return f"{note} {LEGEND}" if start_kept.any(axis=None) else note


def lines(studies: Sequence[tuple[str, pd.DataFrame]]) -> list[dict[str, Any]]:
    """List the cells of which a training kept a start, in some parts or in all: axes for readers,
    ``parts`` in words, ``marked`` or not, key and studies."""
    found: dict[str, dict[str, Any]] = {}
    for study, records in studies:
        own = tidy(records)
        for cell in own[own.start_kept.isin(["some", "all"])].drop_duplicates("cell").itertuples():
            axes = {axis: value_label(axis, getattr(cell, axis)) for axis in AXES}
            line = {**axes, "parts": said(cell), "marked": cell.start_kept == "all", "cell": cell.cell, "studies": []}
            line = found.setdefault(cell.cell, line)
            line["studies"].append(study)
    return list(found.values())


def said(cell: Any) -> str:
    """Format ``start kept in 3 of 30 parts of the transform`` for every training of a record's cell
    that kept any."""
    counts = (entry.split(" ", 1) for entry in cell.start_kept_parts.split("; "))
    return "; ".join(f"{WORDS} in {count} parts of the {name}" for name, count in counts if not count.startswith("0 "))
