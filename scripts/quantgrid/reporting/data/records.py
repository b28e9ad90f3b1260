"""Tidy records of one study for tables and figures: columns, axis order, the baseline, one cell per
place.

A record is one cell and metric; a failed cell is one record without a metric, a failed task is one
with the task as its dataset. An axis is ordered as its list in the study; values that only other
cells of the study have follow in order of appearance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...config.cells import AXES as LISTS
from ...evaluation.protocols import differences
from ...ground.errors import ConfigError, unknown_name

AXES = ("model", "transform", "mitigation", "granularity", "format")
PLURAL = {axis: plural for plural, axis in LISTS.items()}  # axis -> its key in a study
TEXTS = ("cell", *AXES, "status", "reason", "metric", "dataset", "unit")
STARTS = (
    "start_kept",
    "start_kept_parts",
)  # see quantgrid/learning/outcomes.py; absent from records of earlier versions
RACE = "race_"  # prefix of the metric of a race, such as race_kl_divergence
EVALUATED = ("perplexity", "accuracy")  # metrics of cells that a study evaluates
PROTOCOL = "protocol"  # canonical JSON; empty if there is only one protocol
NUMBERS = ("value", "stderr", "count", "difference", "difference_stderr")
BEST = (
    "best_difference",
    "best_difference_stderr",
)  # paired, to the best cell of the study; absent from records of several studies
BASELINE = {"transform": "none", "mitigation": "none", "granularity": "-", "format": "bf16"}
FULL_PRECISION = "full precision"


def read_records(path: str | Path) -> pd.DataFrame:
    """Read ``studies/{study}.csv``: texts unchanged (never NaN), numbers as float64 (NaN if
    empty); without the cells that left a race, which have no evaluations."""
    return evaluated(tidy(pd.read_csv(path, dtype=str, keep_default_na=False), str(path)))


def evaluated(records: pd.DataFrame) -> pd.DataFrame:
    """Drop the records of races, and all records of the cells that left one."""
    raced = records.metric.str.startswith(RACE)
    left = set(records[raced].cell) - set(records[records.metric.isin(EVALUATED)].cell)
    return records[~raced & ~records.cell.isin(left)].reset_index(drop=True)


def tidy(records: pd.DataFrame, source: str = "records") -> pd.DataFrame:
    """Copy the records with all columns of ``TEXTS`` as str and of ``NUMBERS`` as float64;
    :class:`ConfigError` if a column is missing or a record is duplicated."""
    absent = [name for name in (*TEXTS, *NUMBERS) if name not in records]
    if absent:
        raise ConfigError(
            f"{source}: no column {', '.join(absent)}; accepted are records with {', '.join((*TEXTS, *NUMBERS))}"
        )
    texts = records.reindex(columns=[*TEXTS, PROTOCOL, *STARTS]).astype(object)
    texts = texts.where(texts.notna(), "").astype(str)
    numbers = records.reindex(columns=[*NUMBERS, *BEST]).apply(pd.to_numeric, errors="coerce").astype("float64")
    result = pd.concat([texts, numbers], axis=1).reset_index(drop=True)
    double = result.duplicated(["cell", "metric", "dataset"])
    if double.any():
        first = result[double].iloc[0]
        check_one_protocol(result[result.cell == first.cell], source)
        raise ConfigError(
            f"{source}: cell {first.cell} has two records of metric '{first.metric}', dataset '{first.dataset}'"
        )
    return result


def check_one_protocol(records: pd.DataFrame, key: str) -> None:
    """Raise :class:`ConfigError`, naming the difference, if records of one metric and dataset have
    different protocols.

    ``records`` has cell, model, metric, dataset and protocol. The first record of each model is
    compared with the first of all, and every record with the first of its model.
    """
    for (metric, dataset), part in records[records.metric != ""].groupby(["metric", "dataset"], sort=False):
        first = part.iloc[0]
        for _, own in part.drop_duplicates(["model", PROTOCOL]).groupby("model", sort=False):
            for record in own.itertuples():
                for other, same in ((first, record.model == first.model), (own.iloc[0], True)):
                    if found := differences(other.protocol, record.protocol, same):
                        raise ConfigError(
                            f"{key}: {metric} on '{dataset}' was not measured alike in cells {other.cell} and "
                            f"{record.cell}, so they "
                            f"cannot stand in one table: {'; '.join(found)}. Run both under one protocol"
                        )


def says_failed(record: Any, name: str, dataset: str) -> bool:
    """Check whether a record reports a failure of the metric ``name`` on ``dataset``: of its cell,
    of the task, or of one task in a mean."""
    if record.metric != "" or record.status == "ok":
        return False
    return record.dataset == "" or name == "mean_accuracy" or (name == "accuracy" and record.dataset == dataset)


def is_baseline(records: pd.DataFrame) -> pd.Series:
    """Mark the records of full-precision baseline cells (boolean per record)."""
    return (records[list(BASELINE)] == pd.Series(BASELINE)).all(axis=1)


def order(records: pd.DataFrame, axis: str, spec: Mapping[str, Any]) -> dict[str, int]:
    """Order the values of one axis, without those of the baseline: ``{value: position}``.

    Values listed by the study ``spec`` (``formats: [int2, int3]``) share their positions of first
    appearance in the order of the list: cells that a study excludes do not change it. Granularities
    go from coarse to fine.
    """
    seen = list((records[~is_baseline(records)] if axis != "model" else records)[axis].unique())
    if axis == "granularity":
        return {value: position for position, value in enumerate(sorted(seen, key=coarseness))}
    listed = [value for value in dict.fromkeys(spec.get(PLURAL[axis], ())) if value in seen]
    places = iter(listed)
    return {next(places) if value in listed else value: position for position, value in enumerate(seen)}


def coarseness(granularity: str) -> tuple[bool, bool, int]:
    """Return the sort key of granularities: tensor, channel, large groups, small groups."""
    size = granularity.rpartition("-")[2]
    return granularity != "tensor", granularity not in ("tensor", "channel"), -int(size) if size.isdecimal() else 0


def check_axes(names: Sequence[str], key: str) -> list[str]:
    """Return ``names`` as a list; :class:`ConfigError` names the spec's ``key`` and the unknown or
    repeated axis."""
    for position, name in enumerate(names):
        if name not in AXES:
            raise ConfigError(f"{key}: {unknown_name('axis', name, AXES)}")
        if name in names[:position]:
            raise ConfigError(f"{key}: axis '{name}' is named twice")
    return list(names)


def left_over(records: pd.DataFrame, used: Sequence[str]) -> list[str]:
    """List the axes needed besides ``used`` to distinguish all cells (the baseline counts for
    ``model`` only).

    An axis determined by the others is not among them, such as the granularity of a block format.
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
    """Raise :class:`ConfigError` if two quantized cells, or two baselines of a model, agree in
    ``axes`` and would share one place."""
    baseline = is_baseline(records)
    for part, agree in ((records[~baseline], list(axes)), (records[baseline], ["model"])):
        cells = part.drop_duplicates("cell")
        if agree:
            cells = cells[cells.duplicated(agree, keep=False)]
            cells = cells[(cells[agree] == cells[agree].iloc[0]).all(axis=1)] if len(cells) else cells
        if len(cells) > 1:
            names = "; ".join(
                f"{cell.cell} ({', '.join(getattr(cell, axis) for axis in AXES)})" for cell in cells.itertuples()
            )
            raise ConfigError(f"{key}: these cells fall into one place, which can show one only: {names}")


def datasets_of(records: pd.DataFrame, metric: str, wanted: Sequence[str] = (), key: str = "datasets") -> list[str]:
    """List the datasets of one metric in order of appearance, restricted to ``wanted`` if given;
    ``[""]`` for a metric without datasets."""
    present = list(records.loc[records.metric == metric, "dataset"].unique())
    if not wanted or not any(present):
        return present or [""]
    kept = [name for name in wanted if name in present]
    if not kept:
        raise ConfigError(
            f"{key}: metric '{metric}' was measured on none of {', '.join(wanted)}. Accepted: {', '.join(present)}"
        )
    return kept
