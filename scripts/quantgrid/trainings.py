"""Outcomes of the trainings behind a cell, as its results record them: whether each part kept its start.

A training is that of the cell's ``transform`` or of its ``mitigation``; its parts are ``all`` of the parameters or
the decoder layers. Each part has its loss at ``start`` and ``end``, and ``kept``: ``learned``, ``start``, or
``untrained`` where no step was taken (``steps: 0``, or nothing is rounded). A cell of
which a training kept the start in all parts is what the transform or mitigation starts from, under another name:
tables, figures, claims and recommendations mark it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .storage import read_metadata

TRAINED = ("transform", "mitigation")  # in this order
Ends = Mapping[str, Mapping[str, Any]]  # part -> start, end, kept


def of_transform(path: str | Path) -> dict[str, Ends]:
    """The training of the transform at ``path`` as a result records it; empty for one that is not learned."""
    found = read_metadata(path).get("learning")
    return {"transform": found} if found else {}


def columns(trainings: Mapping[str, Ends]) -> dict[str, str]:
    """Columns of a cell's records.

    ``start_kept``: ``all`` where a training kept the start in all of its parts, ``some`` where in some, ``none``, and
    empty where nothing was trained. ``start_kept_parts``: in how many, ``transform 3 of 30; mitigation 0 of 1``.
    """
    counts: dict[str, tuple[int, int]] = {}
    for name in TRAINED:
        if name in trainings:
            kept = [end["kept"] == "start" for end in trainings[name].values()]
            counts[name] = sum(kept), len(kept)
    state = "none" if counts else ""
    if any(kept for kept, _ in counts.values()):
        state = "all" if any(kept == parts for kept, parts in counts.values()) else "some"
    said = (f"{name} {kept} of {parts}" for name, (kept, parts) in counts.items())
    return {"start_kept": state, "start_kept_parts": "; ".join(said)}
