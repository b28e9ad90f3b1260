"""Collection of evaluations (JSON) into tidy records: one row per cell and metric, with paired
differences to full precision and to the best cell.

Axes come from the plan, never from paths. :mod:`.evaluation_rows` makes the rows of a cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...config.cells import Cell, baseline
from ...evaluation.significance import paired_difference, perplexity_difference
from ...ground.errors import ConfigError
from ...ground.provenance import canonical
from ...ground.storage import replacing
from ...jobs.integrity import read_verified
from .evaluation_rows import Row, cell_key, cell_rows, measured_tasks, root
from .records import NUMBERS, check_one_protocol


def read_evaluations(
    paths: Mapping[Cell, Mapping[str, str]], missing_allowed: bool = False, damaged: dict[str, str] | None = None
) -> dict[Cell, dict[str, Mapping[str, Any]]]:
    """Read and verify evaluations: cell -> name of the evaluation -> its JSON.

    A missing file is a :class:`ConfigError` unless allowed; a damaged one is too, unless
    ``damaged`` is given: then it is skipped and ``damaged`` maps its path to the fault.
    """
    found: dict[Cell, dict[str, Mapping[str, Any]]] = {}
    for cell, named in paths.items():
        found[cell] = {}
        for name, path in named.items():
            try:
                found[cell][name] = json.loads(read_verified(path))
            except FileNotFoundError:
                if not missing_allowed:
                    raise ConfigError(
                        f"{path}: this evaluation is not there; the code may have changed while "
                        "the workflow ran: run it "
                        "again"
                    ) from None
            except ConfigError as error:
                if damaged is None:
                    raise
                damaged[path] = str(error)
    return found


def records(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """Build the tidy records of all cells, in their order; :class:`ConfigError` if cells of one
    dataset have different protocols."""
    check_one_protocol(protocols_of(evaluations), "evaluations")
    rows = all_rows(evaluations)
    compare_with_best(rows)
    return pd.DataFrame(
        rows,
        columns=[
            "cell",
            "model",
            "transform",
            "mitigation",
            "granularity",
            "format",
            "status",
            "reason",
            "metric",
            "dataset",
            "value",
            "stderr",
            "count",
            "difference",
            "difference_stderr",
            "best_difference",
            "best_difference_stderr",
            "unit",
            "protocol",
            "start_kept",
            "start_kept_parts",
        ],
    )


def all_rows(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """Build the rows of every cell, each with the values behind its mean, if any (``items``)."""
    return [
        row
        for cell, found in evaluations.items()
        for row in cell_rows(cell, found, evaluations.get(baseline(cell.model), {}))
    ]


def items(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """List the paired values: one line per window or sample, with its cell, metric, dataset and
    number from 0."""
    kept = [
        row for row in all_rows(evaluations) if "items" in row and row["metric"] != "perplexity"
    ]  # losses, for perplexity
    columns = {name: [row[name] for row in kept for _ in row["items"]] for name in ("cell", "metric", "dataset")}
    columns |= {"item": [number for row in kept for number in range(len(row["items"]))]}
    return pd.DataFrame({**columns, "value": [float(value) for row in kept for value in row["items"]]})


def protocols_of(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """List the protocols, one line per cell and evaluated dataset: cell, model, metric, dataset,
    protocol (canonical JSON)."""
    lines = []
    for cell, found in evaluations.items():
        for name, content in found.items():
            kind, _, dataset = name.partition(".")
            own = {dataset: content} if kind == "perplexity" else measured_tasks(content) if kind == "tasks" else {}
            lines += [
                (cell_key(cell), cell.model, kind, dataset, canonical(result["protocol"]))
                for dataset, result in own.items()
                if content["status"] == "ok"
            ]
    return pd.DataFrame(lines, columns=["cell", "model", "metric", "dataset", "protocol"])


def compare_with_best(rows: Sequence[Row]) -> None:
    """Add to every row of a quantized cell its paired difference to the best quantized cell of its
    model, metric and dataset.

    The pairing must be with the best cell itself: losses of two cells far from full precision
    correlate over the windows.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["mitigation"] != "none" and ("items" in row or "parts" in row):
            groups.setdefault((row["model"], row["metric"], row["dataset"]), []).append(row)
    for group in groups.values():
        best = (max if "accuracy" in group[0]["metric"] else min)(group, key=lambda row: row["value"])
        for row in group:
            row["best_difference"], row["best_difference_stderr"] = difference_of(row, best)


def difference_of(row: Row, other: Row) -> tuple[float, float | None]:
    """Compute the paired difference of two rows of one metric and its standard error; for means
    over tasks, task by task."""
    if "parts" in row:
        found = [paired_difference(own, part) for own, part in zip(row["parts"], other["parts"], strict=True)]
        errors = [error for _, error in found]
        return math.fsum(value for value, _ in found) / len(found), None if None in errors else root(errors)
    return (perplexity_difference if row["metric"] == "perplexity" else paired_difference)(row["items"], other["items"])


def read(path: str | Path) -> pd.DataFrame:
    """Read all columns of the records of one study as written by :func:`write`."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in NUMBERS})


def merge(studies: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Merge the records of several studies into one frame; a shared cell occurs once, with all its
    measurements."""
    merged = pd.concat(studies, ignore_index=True).drop_duplicates(["cell", "metric", "dataset", "protocol"])
    merged = merged.drop(
        columns=["best_difference", "best_difference_stderr"], errors="ignore"
    )  # defined over a study's cells
    return merged.sort_values(
        ["cell"],
        key=lambda cells: cells.map({cell: i for i, cell in enumerate(merged["cell"].unique())}),
        kind="stable",
    )


def write(frame: pd.DataFrame, path: str | Path) -> None:
    """Write CSV or, by its suffix, parquet; atomically."""
    with replacing(path) as temporary:
        if temporary.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False, lineterminator="\n")
