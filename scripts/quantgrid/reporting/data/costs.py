"""Costs of a run: what each job recorded of its time and memory, and sums per rule. No other module
of the reports reads times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from ...ground.errors import ConfigError

COLUMNS = {"s": "seconds", "max_rss": "max_rss_mb", "cpu_time": "cpu_seconds"}


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Read the records of ``{folder}/{rule}/.../{key}.tsv``, sorted by rule and name: rule, name
    (path below the rule, no suffix), seconds of wall time, max_rss_mb (MiB) and cpu_seconds. NaN for
    a value that a file lacks (Snakemake wrote such files before jobs did); of several rows the mean
    time and the largest memory. An empty file is that of a failed job: Snakemake creates it."""
    root = Path(folder)
    result = []
    for path in sorted(path for path in root.glob("*/**/*.tsv") if path.stat().st_size):
        rule, *_ = path.relative_to(root).parts
        name = path.relative_to(root / rule).with_suffix("").as_posix()
        result.append({"rule": rule, "name": name, **read_one(path)})
    return result


def read_one(path: Path) -> dict[str, float]:
    """Read the three numbers of one benchmark file; :class:`ConfigError` for any other file."""
    try:
        table = pd.read_csv(path, sep="\t")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a benchmark file ({error}); delete it") from None
    if "s" not in table:
        raise ConfigError(f"{path}: not a benchmark file (no column 's'); delete it")
    numbers = {
        name: pd.to_numeric(table[column], errors="coerce") if column in table else pd.Series([math.nan])
        for column, name in COLUMNS.items()
    }
    return {name: float(column.max() if name == "max_rss_mb" else column.mean()) for name, column in numbers.items()}


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum the costs per rule: jobs, seconds and cpu_seconds as sums, seconds_max and max_rss_mb as
    maxima over jobs; the costliest rule first."""
    if not records:
        return []
    columns = {"jobs": ("name", "size"), "seconds": ("seconds", "sum"), "seconds_max": ("seconds", "max")}
    columns |= {"cpu_seconds": ("cpu_seconds", "sum"), "max_rss_mb": ("max_rss_mb", "max")}
    rules = pd.DataFrame(records).groupby("rule").agg(**columns).reset_index()
    return rules.sort_values(["seconds", "rule"], ascending=[False, True]).to_dict("records")
