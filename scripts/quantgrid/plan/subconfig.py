"""Subsets of a config that determine the steps, passed to jobs that rebuild the plan. Standard
library only.

They omit settings of tables, figures and the report, and entries for readers (notes) or checks
(published numbers), so that an edit of these changes no such job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..config import entries, grid
from ..config.cells import AXES, Cell
from ..config.entries import without_note

SHOWN = ("title", "description", "paper", "table", "figure", "compare")  # keys of a study
NOTED = (*AXES, "corpora", "tasks")


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``config`` that determines all its steps."""
    part = {**config, "report": {"distributions": config["report"]["distributions"]}}
    part["exports"] = [without_note(entry) for entry in config.get("exports", ())]
    return _without_notes(part) | {"studies": {study: _unshown(config, study) for study in config["studies"]}}


def of_study(config: Mapping[str, Any], study: str, cells: Iterable[Cell]) -> dict[str, Any]:
    """Return the part of ``config`` that determines the ``cells`` of a study and the paths of their
    evaluations."""
    cells, entry = list(cells), config["studies"][study]
    part = {key: value for key, value in config.items() if key not in ("studies", "report", "exports")}
    for axis, singular in AXES.items():
        if axis in part:  # a name must be known even if 'exclude' removes all its cells
            used = {getattr(cell, singular) for cell in cells} | {
                name for named, name, _ in grid.names_in(entry) if named == axis
            }
            if axis == "formats":
                used |= entries.candidate_formats(config, used)
            part[axis] = {
                name: given
                for name, given in part[axis].items()
                if used & {name, *entries.entry_names(config, axis, name, axis)}
            }
    wanted = grid.asked(config, entry)
    read = {
        *wanted["perplexity"],
        *wanted["residual_error"],
        *(given["corpus"] for given in part["calibrations"].values()),
        *([entry["race"]["windows"]] if "race" in entry else []),
    }
    part |= {
        "corpora": {name: part["corpora"][name] for name in read},
        "tasks": {name: part["tasks"][name] for name in wanted["tasks"]},
    }
    return _without_notes(part) | {"studies": {study: _unshown(config, study)}}


def named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``config`` that defines the axis values in results; claims use it to match
    cells."""
    return _without_notes({kind: config[kind] for kind in AXES if kind in config})


def _without_notes(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **part,
        **{kind: {name: without_note(entry) for name, entry in part[kind].items()} for kind in NOTED if kind in part},
    }


def _unshown(config: Mapping[str, Any], study: str) -> dict[str, Any]:
    return {key: value for key, value in config["studies"][study].items() if key not in SHOWN}
