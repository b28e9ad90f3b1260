"""Cells of one entry with several seeds as one: mean and standard deviation over the seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from .records import AXES, PLURAL

SEEDED = ("transform", "mitigation")  # axes whose entries may list seeds
SEED = re.compile(r"(.+)-s\d+")  # name of one seed of an entry
JOINED = "+"  # between the keys of merged cells
NOTE = "Of several seeds: mean ± standard deviation over the seeds, without a mark."


def merged(records: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Merge the records of cells that differ in the seed of one entry of the study ``spec`` alone.

    A merged record has ``NAME, N seeds`` on its axis, the mean of the values, and as ``stderr`` their standard
    deviation over the seeds; ``cell`` joins those of the seeds (:data:`JOINED`). A failed cell is no seed of it.
    """
    for axis in SEEDED:
        names = seeded_names(records, axis, spec)
        others = [name for name in (*AXES, "metric", "dataset") if name != axis]
        own = records[(records.status == "ok") & records[axis].isin(names)]
        own = own.assign(base=own[axis].map(names))
        groups = [part for _, part in own.groupby([*others, "base"], sort=False, dropna=False) if len(part) > 1]
        if groups:
            gone = {index for part in groups for index in part.index}
            rows = {part.index[0]: one(part, axis) for part in groups}
            kept = records.drop(index=[index for index in gone if index not in rows])
            records = pd.DataFrame([rows.get(index, row) for index, row in kept.iterrows()]).astype(records.dtypes)
    return records.reset_index(drop=True)


def seeded_names(records: pd.DataFrame, axis: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Map the values of an axis that are seeds of an entry named in the study to the entry."""
    listed = {name for block in (spec, *spec.get("also", ())) for name in named(block.get(PLURAL[axis], ()))}
    found = {value: SEED.fullmatch(value) for value in records[axis].unique() if value not in listed}
    return {value: match[1] for value, match in found.items() if match and match[1] in listed}


def named(values: str | list[str]) -> Iterator[str]:
    yield from [values] if isinstance(values, str) else values


def one(part: pd.DataFrame, axis: str) -> pd.Series:
    """Merge the records of one metric, a record per seed."""
    return pd.Series(
        {
            **part.iloc[0],
            axis: f"{part.base.iloc[0]}, {len(part)} seeds",
            "cell": JOINED.join(part.cell),
            "value": part.value.mean(),
            "stderr": part.value.std(),
            "best_difference": math.nan,
            "best_difference_stderr": math.nan,
            "start_kept": "all" if (part.start_kept == "all").all() else "",
        }
    ).drop("base")
