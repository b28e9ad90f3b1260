"""From the JSON of the evaluations to tidy records: one row per cell and metric, paired differences to full precision beside.

A cell with an evaluation that failed is one row with its reason. Axes come from the plan, never from paths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .. import trainings
from ..errors import ConfigError
from ..evaluation.protocols import of_mean
from ..evaluation.significance import mean_and_error, paired_difference, perplexity, perplexity_difference
from ..grid import Cell, baseline
from ..integrity import read_verified
from ..provenance import canonical, digest
from ..storage import replacing
from .records import NUMBERS, check_one_protocol

UNITS = {"negative_log_likelihood": "nats/token", "kl_divergence": "nats/token", "bits_per_weight": "bits", "stored_bits_per_weight": "bits",
         "weight_sqnr_db": "dB", "output_sqnr_db": "dB", "joint_output_sqnr_db": "dB",
         "online_operations_per_token": "operations", "added_parameters": "parameters", "added_bits_per_weight": "bits",
         "untied_parameters": "parameters"}
SUMMARY = {"bits": "bits_per_weight", "stored_bits": "stored_bits_per_weight", "added_bits": "added_bits_per_weight",
           "online_operations": "online_operations_per_token"}
Row = dict[str, Any]


def cell_key(cell: Cell) -> str:
    """Short key of a cell, the same in every table of a results folder."""
    return digest(cell.axes)


def read_evaluations(paths: Mapping[Cell, Mapping[str, str]], missing_allowed: bool = False,
                     damaged: dict[str, str] | None = None) -> dict[Cell, dict[str, Mapping[str, Any]]]:
    """Cell -> name of the evaluation -> its JSON, verified.

    A missing file is a :class:`ConfigError` unless allowed, one that is not as its step wrote it as well; with ``damaged`` such a file is left out,
    and what is wrong with it put there by its path.
    """
    found: dict[Cell, dict[str, Mapping[str, Any]]] = {}
    for cell, named in paths.items():
        found[cell] = {}
        for name, path in named.items():
            try:
                found[cell][name] = json.loads(read_verified(path))
            except FileNotFoundError:
                if not missing_allowed:
                    raise ConfigError(f"{path}: this evaluation is not there; the code may have changed while the workflow ran: run it "
                                      "again") from None
            except ConfigError as error:
                if damaged is None:
                    raise
                damaged[path] = str(error)
    return found


def records(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """Tidy records of all cells, in their order; :class:`ConfigError` where cells of one dataset were not measured alike."""
    check_one_protocol(protocols_of(evaluations), "evaluations")
    rows = all_rows(evaluations)
    compare_with_best(rows)
    return pd.DataFrame(rows, columns=["cell", "model", "transform", "mitigation", "granularity", "format", "status", "reason", "metric", "dataset",
                                       "value", "stderr", "count", "difference", "difference_stderr", "best_difference", "best_difference_stderr",
                                       "unit", "protocol", "start_kept", "start_kept_parts"])


def all_rows(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """The rows of every cell, each with the numbers behind its mean where it is one (``items``)."""
    return [row for cell, found in evaluations.items() for row in cell_rows(cell, found, evaluations.get(baseline(cell.model), {}))]


def items(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """What differences are paired over: one line per window or sample, with its cell, metric, dataset and number from 0."""
    kept = [row for row in all_rows(evaluations) if "items" in row and row["metric"] != "perplexity"]  # of perplexity the losses are
    columns = {name: [row[name] for row in kept for _ in row["items"]] for name in ("cell", "metric", "dataset")}
    columns |= {"item": [number for row in kept for number in range(len(row["items"]))]}
    return pd.DataFrame({**columns, "value": [float(value) for row in kept for value in row["items"]]})


def protocols_of(evaluations: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """One line per cell and evaluated dataset: cell, model, metric, dataset, protocol (canonical JSON)."""
    lines = []
    for cell, found in evaluations.items():
        for name, content in found.items():
            kind, _, dataset = name.partition(".")
            own = {dataset: content} if kind == "perplexity" else measured_tasks(content) if kind == "tasks" else {}
            lines += [(cell_key(cell), cell.model, kind, dataset, canonical(result["protocol"])) for dataset, result in own.items()
                      if content["status"] == "ok"]
    return pd.DataFrame(lines, columns=["cell", "model", "metric", "dataset", "protocol"])


def compare_with_best(rows: Sequence[Row]) -> None:
    """Give every row of a quantized cell its paired difference to the best quantized cell of its model, metric and dataset.

    Pairing with the best itself matters: two cells far from full precision vary together over the windows.
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
    """The paired difference of two rows of one metric and its standard error; of means over tasks, task by task."""
    if "parts" in row:
        found = [paired_difference(own, part) for own, part in zip(row["parts"], other["parts"], strict=True)]
        errors = [error for _, error in found]
        return math.fsum(value for value, _ in found) / len(found), None if None in errors else root(errors)
    return (perplexity_difference if row["metric"] == "perplexity" else paired_difference)(row["items"], other["items"])


def cell_rows(cell: Cell, found: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of one cell; ``reference`` holds the evaluations of its model's full-precision cell."""
    trained = trainings.columns(found.get("error", {}).get("trainings", {}))
    common = {"cell": cell_key(cell), **cell.axes, "status": "ok", "reason": "", **trained}
    if failed := [content["reason"] for content in found.values() if content["status"] == "failed"]:
        yield {**common, "status": "failed", "reason": failed[0]}
        return
    for name, content in found.items():
        kind, _, dataset = name.partition(".")
        other = reference.get(name)
        other = other if other and other["status"] == "ok" else None
        rows = {"error": error_rows, "perplexity": perplexity_rows, "tasks": task_rows, "depth": depth_rows}[kind](content, other, dataset)
        yield from ({**common, "unit": UNITS.get(row["metric"], ""), **row} for row in rows)


def error_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    for name, value in content["summary"].items():
        yield {"metric": SUMMARY.get(name, name), "dataset": "", "value": value, "count": len(content["linears"])}


def perplexity_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    protocol = canonical(content["protocol"])
    for metric in ("perplexity", "negative_log_likelihood", "kl_divergence"):
        losses = content["windows"]["negative_log_likelihood" if metric == "perplexity" else metric]
        value, error = perplexity(losses) if metric == "perplexity" else mean_and_error(losses)
        row = {"metric": metric, "dataset": dataset, "value": value, "stderr": error, "count": len(losses), "protocol": protocol,
               "items": losses}
        if other and metric != "kl_divergence":
            difference = perplexity_difference if metric == "perplexity" else paired_difference
            row["difference"], row["difference_stderr"] = difference(losses, other["windows"]["negative_log_likelihood"])
        yield row


def depth_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    yield {"metric": "stream_error", "dataset": dataset, "value": content["layers"][-1]["error"], "count": content["windows"]}


def measured_tasks(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Task -> result of those tasks of an evaluation that did not fail."""
    return {task: result for task, result in content.get("tasks", {}).items() if result.get("status") != "failed"}


def task_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    rows: list[Row] = []
    measured, reference = measured_tasks(content), measured_tasks(other or {})
    for task, result in measured.items():
        row = {"metric": "accuracy", "dataset": task, "value": result["value"], "stderr": result["stderr"], "count": result["count"],
               "protocol": canonical(result["protocol"]), "items": result["outcomes"]}
        if task in reference:
            row["difference"], row["difference_stderr"] = paired_difference(result["outcomes"], reference[task]["outcomes"])
        rows.append(row)
    yield from rows
    for task, result in content["tasks"].items():
        if task not in measured:
            yield {"metric": "", "dataset": task, "status": "failed", "reason": result["reason"]}
    if len(rows) > 1 and len(rows) == len(content["tasks"]):  # a mean over fewer tasks is another number
        yield mean_row(rows, {task: result["protocol"] for task, result in measured.items()})


def mean_row(rows: Sequence[Row], named: Mapping[str, Mapping[str, Any]]) -> Row:
    """The mean over tasks, every task counting alike; ``parts`` holds the outcomes of each."""
    row = {"metric": "mean_accuracy", "dataset": "", "value": math.fsum(row["value"] for row in rows) / len(rows),
           "stderr": root([row["stderr"] for row in rows]), "count": len(rows), "protocol": canonical(of_mean(named)),
           "parts": [row["items"] for row in rows]}
    if all(row.get("difference_stderr") is not None for row in rows):
        row["difference"] = math.fsum(row["difference"] for row in rows) / len(rows)
        row["difference_stderr"] = root([row["difference_stderr"] for row in rows])
    return row


def root(errors: Sequence[float]) -> float:
    """The standard error of a mean over tasks: they share no samples, so variances add."""
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def read(path: str | Path) -> pd.DataFrame:
    """The records of one study as :func:`write` left them, every column."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in NUMBERS})


def merge(studies: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Records of several studies as one frame; a cell that several studies share is there once, with all that was measured of it."""
    merged = pd.concat(studies, ignore_index=True).drop_duplicates(["cell", "metric", "dataset", "protocol"])
    merged = merged.drop(columns=["best_difference", "best_difference_stderr"], errors="ignore")  # of a study's cells, not of all
    return merged.sort_values(["cell"], key=lambda cells: cells.map({cell: i for i, cell in enumerate(merged["cell"].unique())}), kind="stable")


def write(frame: pd.DataFrame, path: str | Path) -> None:
    """CSV or, by its suffix, parquet; written whole."""
    with replacing(path) as temporary:
        if temporary.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False, lineterminator="\n")
