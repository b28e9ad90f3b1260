"""The part of a config that decides which steps there are: what a job is told that plans them again. Standard library only.

Left out is what only tables, figures and the report are made with, and what is for readers (notes) or checks (published numbers): an edit of these
changes no such job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import grid
from .grid import Cell, without_note

SHOWN = ("title", "description", "paper", "table", "figure", "compare")  # of a study
NOTED = (*grid.AXES, "corpora", "tasks")


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``config`` that decides all its steps."""
    part = {**config, "report": {"distributions": config["report"]["distributions"]}}
    return _without_notes(part) | {"studies": {study: _unshown(config, study) for study in config["studies"]}}


def of_study(config: Mapping[str, Any], study: str, cells: Iterable[Cell]) -> dict[str, Any]:
    """The part of ``config`` that decides which ``cells`` a study has and where their evaluations lie."""
    cells, entry = list(cells), config["studies"][study]
    part = {key: value for key, value in config.items() if key not in ("studies", "report")}
    for axis, singular in grid.AXES.items():
        if axis in part:  # a name that 'exclude' leaves no cell of has to be known all the same
            used = {getattr(cell, singular) for cell in cells} | {name for named, name, _ in grid.names_in(entry) if named == axis}
            part[axis] = {name: given for name, given in part[axis].items() if used & {name, *grid.entry_names(config, axis, name, axis)}}
    wanted = grid.asked(config, entry)
    read = {*wanted["perplexity"], *wanted["depth"], *(given["corpus"] for given in part["calibrations"].values())}
    part |= {"corpora": {name: part["corpora"][name] for name in read}, "tasks": {name: part["tasks"][name] for name in wanted["tasks"]}}
    return _without_notes(part) | {"studies": {study: _unshown(config, study)}}


def named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``config`` that says what the axis values of results mean: what claims need to tell cells apart."""
    return _without_notes({kind: config[kind] for kind in grid.AXES if kind in config})


def _without_notes(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, **{kind: {name: without_note(entry) for name, entry in part[kind].items()} for kind in NOTED if kind in part}}


def _unshown(config: Mapping[str, Any], study: str) -> dict[str, Any]:
    return {key: value for key, value in config["studies"][study].items() if key not in SHOWN}
