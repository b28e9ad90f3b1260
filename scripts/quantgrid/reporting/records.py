"""The tidy records of one study, as tables and figures read them: columns, axis order, the baseline, one cell per place.

A record is one cell and metric; a failed cell is one record without a metric, a failed task one that has the task as its
dataset besides. The order of an axis is that of its list in the study, and of first
appearance for what other cells of the study bring in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import ConfigError, unknown_name
from ..evaluation.protocols import differences
from ..grid import AXES as LISTS

AXES = ("model", "transform", "mitigation", "granularity", "format")
PLURAL = {axis: plural for plural, axis in LISTS.items()}  # what a study calls its list of an axis
TEXTS = ("cell", *AXES, "status", "reason", "metric", "dataset", "unit")
STARTS = ("start_kept", "start_kept_parts")  # see quantgrid/trainings.py; absent from records of earlier versions
PROTOCOL = "protocol"  # canonical JSON; empty for what is measured in one way only
NUMBERS = ("value", "stderr", "count", "difference", "difference_stderr")
BEST = ("best_difference", "best_difference_stderr")  # to the best cell of the study, paired; absent from records of several studies
BASELINE = {"transform": "none", "mitigation": "none", "granularity": "-", "format": "bf16"}
FULL_PRECISION = "full precision"


def read_records(path: str | Path) -> pd.DataFrame:
    """Read ``studies/{study}.csv``: texts as they stand (never NaN), numbers as float64 (NaN where empty)."""
    return tidy(pd.read_csv(path, dtype=str, keep_default_na=False), str(path))


def tidy(records: pd.DataFrame, source: str = "records") -> pd.DataFrame:
    """A copy with all columns of ``TEXTS`` as str and of ``NUMBERS`` as float64; :class:`ConfigError` if one is absent or a record is double."""
    absent = [name for name in (*TEXTS, *NUMBERS) if name not in records]
    if absent:
        raise ConfigError(f"{source}: no column {', '.join(absent)}; accepted are records with {', '.join((*TEXTS, *NUMBERS))}")
    texts = records.reindex(columns=[*TEXTS, PROTOCOL, *STARTS]).astype(object)
    texts = texts.where(texts.notna(), "").astype(str)
    numbers = records.reindex(columns=[*NUMBERS, *BEST]).apply(pd.to_numeric, errors="coerce").astype("float64")
    result = pd.concat([texts, numbers], axis=1).reset_index(drop=True)
    double = result.duplicated(["cell", "metric", "dataset"])
    if double.any():
        first = result[double].iloc[0]
        check_one_protocol(result[result.cell == first.cell], source)
        raise ConfigError(f"{source}: cell {first.cell} has two records of metric '{first.metric}', dataset '{first.dataset}'")
    return result


def check_one_protocol(records: pd.DataFrame, key: str) -> None:
    """:class:`ConfigError` that names the difference if records of one metric and dataset were not measured alike.

    ``records`` has cell, model, metric, dataset and protocol. Compared are the first of each model with the first of all, and every one
    with the first of its model.
    """
    for (metric, dataset), part in records[records.metric != ""].groupby(["metric", "dataset"], sort=False):
        first = part.iloc[0]
        for _, own in part.drop_duplicates(["model", PROTOCOL]).groupby("model", sort=False):
            for record in own.itertuples():
                for other, same in ((first, record.model == first.model), (own.iloc[0], True)):
                    if found := differences(other.protocol, record.protocol, same):
                        raise ConfigError(f"{key}: {metric} on '{dataset}' was not measured alike in cells {other.cell} and {record.cell}, so they "
                                          f"cannot stand in one table: {'; '.join(found)}. Run both under one protocol")


def says_failed(record: Any, name: str, dataset: str) -> bool:
    """Whether a record says that the metric ``name`` on ``dataset`` failed: its cell did, or the task, or one of the tasks of a mean."""
    if record.metric != "" or record.status == "ok":
        return False
    return record.dataset == "" or name == "mean_accuracy" or (name == "accuracy" and record.dataset == dataset)


def is_baseline(records: pd.DataFrame) -> pd.Series:
    """Boolean per record: belongs to a full-precision baseline cell."""
    return (records[list(BASELINE)] == pd.Series(BASELINE)).all(axis=1)


def order(records: pd.DataFrame, axis: str, spec: Mapping[str, Any]) -> dict[str, int]:
    """``{value: position}`` of one axis, without the baseline's own values.

    Values that the study ``spec`` lists (``formats: [int2, int3]``) share their places of first appearance in the order of the list: cells
    that a study excludes do not change it. Granularities go from coarse to fine.
    """
    seen = list((records[~is_baseline(records)] if axis != "model" else records)[axis].unique())
    if axis == "granularity":
        return {value: position for position, value in enumerate(sorted(seen, key=coarseness))}
    listed = [value for value in dict.fromkeys(spec.get(PLURAL[axis], ())) if value in seen]
    places = iter(listed)
    return {next(places) if value in listed else value: position for position, value in enumerate(seen)}


def coarseness(granularity: str) -> tuple[bool, bool, int]:
    """What granularities are sorted by: tensor, channel, large groups, small groups."""
    size = granularity.rpartition("-")[2]
    return granularity != "tensor", granularity not in ("tensor", "channel"), -int(size) if size.isdecimal() else 0


def check_axes(names: Sequence[str], key: str) -> list[str]:
    """``names`` as a list, or :class:`ConfigError` naming the spec's ``key`` and the axis that is none, or is there twice."""
    for position, name in enumerate(names):
        if name not in AXES:
            raise ConfigError(f"{key}: {unknown_name('axis', name, AXES)}")
        if name in names[:position]:
            raise ConfigError(f"{key}: axis '{name}' is named twice")
    return list(names)


def left_over(records: pd.DataFrame, used: Sequence[str]) -> list[str]:
    """Axes that a place in ``used`` does not yet tell apart (the baseline counts for ``model`` only).

    An axis that follows from the others, as the granularity of a block format does from its format, is not among them.
    """
    found: list[str] = []
    for axis in AXES:
        part = records if axis == "model" else records[~is_baseline(records)]
        known = [*used, *found]
        values = part.groupby(known)[axis].nunique().max() if known and len(part) else part[axis].nunique()
        if axis not in used and values > 1:
            found.append(axis)
    return found


def check_one_cell_each(records: pd.DataFrame, axes: Sequence[str], key: str) -> None:
    """:class:`ConfigError` if two quantized cells, or two baselines of a model, agree in ``axes``: one place would hold both."""
    baseline = is_baseline(records)
    for part, agree in ((records[~baseline], list(axes)), (records[baseline], ["model"])):
        cells = part.drop_duplicates("cell")
        if agree:
            cells = cells[cells.duplicated(agree, keep=False)]
            cells = cells[(cells[agree] == cells[agree].iloc[0]).all(axis=1)] if len(cells) else cells
        if len(cells) > 1:
            names = "; ".join(f"{cell.cell} ({', '.join(getattr(cell, axis) for axis in AXES)})" for cell in cells.itertuples())
            raise ConfigError(f"{key}: these cells fall into one place, which can show one only: {names}")


def datasets_of(records: pd.DataFrame, metric: str, wanted: Sequence[str] = (), key: str = "datasets") -> list[str]:
    """Datasets of one metric in order of appearance, cut to ``wanted`` if given; ``[""]`` for a metric that has none."""
    present = list(records.loc[records.metric == metric, "dataset"].unique())
    if not wanted or not any(present):
        return present or [""]
    kept = [name for name in wanted if name in present]
    if not kept:
        raise ConfigError(f"{key}: metric '{metric}' was measured on none of {', '.join(wanted)}. Accepted: {', '.join(present)}")
    return kept
