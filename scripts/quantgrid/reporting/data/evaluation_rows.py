"""Rows of one cell: one per metric, from the JSON of its evaluations, with paired differences to
full precision.

A cell with a failed evaluation is one row with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...config.cells import Cell
from ...evaluation.protocols import of_mean
from ...evaluation.significance import mean_and_error, paired_difference, perplexity, perplexity_difference
from ...ground.provenance import canonical, digest
from ...learning import outcomes

UNITS = {
    "negative_log_likelihood": "nats/token",
    "kl_divergence": "nats/token",
    "race_kl_divergence": "nats/token",
    "race_negative_log_likelihood": "nats/token",
    "predicted_kl_divergence": "nats/token",
    "bits_per_weight": "bits",
    "stored_bits_per_weight": "bits",
    "weight_sqnr_db": "dB",
    "output_sqnr_db": "dB",
    "joint_output_sqnr_db": "dB",
    "online_operations_per_token": "operations",
    "added_parameters": "parameters",
    "added_bits_per_weight": "bits",
    "untied_parameters": "parameters",
    "expert_tokens_smallest": "tokens/channel",
    "expert_tokens_median": "tokens/channel",
}
SUMMARY = {
    "bits": "bits_per_weight",
    "stored_bits": "stored_bits_per_weight",
    "added_bits": "added_bits_per_weight",
    "online_operations": "online_operations_per_token",
}
Row = dict[str, Any]


def cell_key(cell: Cell) -> str:
    """Return the short key of a cell, the same in every table of a results folder."""
    return digest(cell.axes)


def cell_rows(
    cell: Cell, found: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]
) -> Iterator[Row]:
    """Build the rows of one cell; ``reference`` holds the evaluations of its model's full-precision
    cell."""
    trained = outcomes.columns(found.get("error", {}).get("trainings", {}))
    common = {"cell": cell_key(cell), **cell.axes, "status": "ok", "reason": "", **trained}
    if failed := [content["reason"] for content in found.values() if content["status"] == "failed"]:
        yield {**common, "status": "failed", "reason": failed[0]}
        return
    for name, content in found.items():
        kind, _, dataset = name.partition(".")
        other = reference.get(name)
        other = other if other and other["status"] == "ok" else None
        rows = {
            "error": error_rows,
            "perplexity": perplexity_rows,
            "tasks": task_rows,
            "residual_error": residual_error_rows,
            "race": race_rows,
        }[kind]
        yield from ({**common, "unit": UNITS.get(row["metric"], ""), **row} for row in rows(content, other, dataset))


def error_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    for name, value in content["summary"].items():
        yield {"metric": SUMMARY.get(name, name), "dataset": "", "value": value, "count": len(content["linears"])}


def perplexity_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    protocol = canonical(content["protocol"])
    for metric in ("perplexity", "negative_log_likelihood", "kl_divergence"):
        losses = content["windows"]["negative_log_likelihood" if metric == "perplexity" else metric]
        value, error = perplexity(losses) if metric == "perplexity" else mean_and_error(losses)
        row = {
            "metric": metric,
            "dataset": dataset,
            "value": value,
            "stderr": error,
            "count": len(losses),
            "protocol": protocol,
            "items": losses,
        }
        if other and metric != "kl_divergence":
            difference = perplexity_difference if metric == "perplexity" else paired_difference
            row["difference"], row["difference_stderr"] = difference(
                losses, other["windows"]["negative_log_likelihood"]
            )
        yield row


def race_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    """Mean loss of a candidate on its windows of a race; no other candidate need have as many."""
    yield {
        **{name: content[name] for name in ("metric", "value", "stderr", "count")},
        "dataset": dataset,
        "protocol": canonical(content["protocol"]),
    }


def residual_error_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    yield {
        "metric": "residual_error",
        "dataset": dataset,
        "value": content["layers"][-1]["error"],
        "count": content["windows"],
    }


def measured_tasks(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Select the tasks of an evaluation that did not fail: task -> result."""
    return {task: result for task, result in content.get("tasks", {}).items() if result.get("status") != "failed"}


def task_rows(content: Mapping[str, Any], other: Mapping[str, Any] | None, dataset: str) -> Iterator[Row]:
    rows: list[Row] = []
    measured, reference = measured_tasks(content), measured_tasks(other or {})
    for task, result in measured.items():
        row = {
            "metric": "accuracy",
            "dataset": task,
            "value": result["value"],
            "stderr": result["stderr"],
            "count": result["count"],
            "protocol": canonical(result["protocol"]),
            "items": result["outcomes"],
        }
        if task in reference:
            row["difference"], row["difference_stderr"] = paired_difference(
                result["outcomes"], reference[task]["outcomes"]
            )
        rows.append(row)
    yield from rows
    for task, result in content["tasks"].items():
        if task not in measured:
            yield {"metric": "", "dataset": task, "status": "failed", "reason": result["reason"]}
    # a mean over fewer tasks is not comparable
    if len(rows) > 1 and len(rows) == len(content["tasks"]):
        yield mean_row(rows, {task: result["protocol"] for task, result in measured.items()})


def mean_row(rows: Sequence[Row], named: Mapping[str, Mapping[str, Any]]) -> Row:
    """Compute the unweighted mean over tasks; ``parts`` holds the outcomes of each."""
    row = {
        "metric": "mean_accuracy",
        "dataset": "",
        "value": math.fsum(row["value"] for row in rows) / len(rows),
        "stderr": root([row["stderr"] for row in rows]),
        "count": len(rows),
        "protocol": canonical(of_mean(named)),
        "parts": [row["items"] for row in rows],
    }
    if all(row.get("difference_stderr") is not None for row in rows):
        row["difference"] = math.fsum(row["difference"] for row in rows) / len(rows)
        row["difference_stderr"] = root([row["difference_stderr"] for row in rows])
    return row


def root(errors: Sequence[float]) -> float:
    """Compute the standard error of a mean over tasks: tasks share no samples, so variances add."""
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
