"""Outcomes of the trainings of a cell: whether each part kept its initial parameters.

A training belongs to the cell's ``transform`` or ``mitigation``; its parts are ``all`` parameters
or the decoder layers. Each part has its loss at ``start`` and ``end``, and ``kept``: ``learned``,
``start``, or ``untrained`` without steps (``steps: 0``, or nothing is rounded). A cell that kept
the start in all parts of a training equals its initial transform or mitigation under another name:
tables, figures, claims and recommendations mark it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ground.storage import read_metadata

TRAINED = ("transform", "mitigation")  # in this order
Ends = Mapping[str, Mapping[str, Any]]  # part -> start, end, kept


def of_transform(path: str | Path) -> dict[str, Ends]:
    """Outcome of training the transform at ``path``; empty for one that is not learned."""
    found = read_metadata(path).get("learning")
    return {"transform": found} if found else {}


def columns(trainings: Mapping[str, Ends]) -> dict[str, str]:
    """Columns of a cell's records.

    ``start_kept``: ``all`` if a training kept the start in all of its parts, ``some``, ``none``, or
    empty if nothing was trained. ``start_kept_parts``: the counts, ``transform 3 of 30; mitigation
    0 of 1``.
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
