"""Defaults for a study's table, figure and comparisons, and the checks of them against the config.
Standard library only.

An axis has one place in a table or a figure; an axis that varies without a place gets one
automatically (``reporting/tables`` and ``reporting/figures``). A metric must be measured by the
study's evaluations, and a dataset must be one that it is measured on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..ground.errors import unknown_name

# Metric -> key of `evaluate` with its datasets; None for metrics of the weights.
MEASURED_BY = {
    "perplexity": "perplexity",
    "negative_log_likelihood": "perplexity",
    "kl_divergence": "perplexity",
    "accuracy": "tasks",
    "residual_error": "residual_error",
}
_X_AXES = ("mitigation", "transform", "format")


def table_defaults(given: Mapping[str, Any], asked: Mapping[str, list[str]]) -> dict[str, Any]:
    """Fill in the defaults of a table: transforms by mitigations, unless the study places these
    axes; divergence and perplexity, or the accuracy in a study with tasks only."""
    placed = {*given.get("rows", ()), *given.get("columns", ())}
    return {
        "rows": sorted({"transform"} - placed),
        "columns": sorted({"mitigation"} - placed),
        "metrics": _of_tasks(asked) or ["kl_divergence", "perplexity"],
        **given,
    }


def figure_defaults(given: Mapping[str, Any], asked: Mapping[str, list[str]]) -> dict[str, Any]:
    """Fill in the defaults of a figure: divergence by mitigation, a series per transform, unless
    the study places these axes; the accuracy on a linear scale in a study with tasks only."""
    placed = {given.get(key) for key in ("x", "hue", "facet")}
    x = given.get("x") or next(axis for axis in _X_AXES if axis not in placed)
    hue = {} if "transform" in {x, *placed} else {"hue": "transform"}
    accuracy = _of_tasks(asked)
    metric, scale = (accuracy[0], "linear") if accuracy else ("kl_divergence", "log")
    return {"kind": "dots", "x": x, **hue, "metric": metric, "scale": scale, **given}


def _of_tasks(asked: Mapping[str, list[str]]) -> list[str]:
    """Metric of a study with tasks only; empty for another."""
    if asked["perplexity"] or not asked["tasks"]:
        return []
    return ["accuracy" if len(asked["tasks"]) == 1 else "mean_accuracy"]


def compare_defaults(given: Mapping[str, Any], asked: Mapping[str, list[str]]) -> dict[str, Any]:
    """Fill in the default of comparisons: losses, or task outcomes in a study with tasks only."""
    return {"metrics": ["negative_log_likelihood" if asked["perplexity"] else "accuracy"], **given}


def mistakes(study: Mapping[str, Any], asked: Mapping[str, list[str]], where: str) -> Iterator[str]:
    """List mistakes in the table, the figure and the comparisons of a study that evaluates
    ``asked`` (key of ``evaluate`` -> names)."""
    table, figure = study["table"], study["figure"]
    yield from _twice([*table["rows"], *table["columns"]], f"{where}.table", "rows or columns")
    yield from _twice(
        [figure[key] for key in ("x", "hue", "facet") if key in figure], f"{where}.figure", "x, hue or facet"
    )
    for metric in study.get("compare", {}).get("metrics", []):
        yield from _unmeasured(metric, [], asked[MEASURED_BY[metric]], f"{where}.compare", f"{where}.compare.metrics")
    wanted = [("table", metric, table.get("datasets", [])) for metric in table["metrics"]]
    wanted.append(("figure", figure["metric"], [figure["dataset"]] if "dataset" in figure else []))
    for part, metric, datasets in wanted:
        key = f"{where}.{part}.dataset{'s' if part == 'table' else ''}"
        known = list(dict.fromkeys([*asked["perplexity"], *asked["tasks"], *asked["residual_error"]]))
        if unknown := [name for name in datasets if name not in known]:
            yield f"{key}: {unknown_name('dataset', unknown[0], known)}"
        elif metric == "mean_accuracy" and len(asked["tasks"]) < 2:
            yield f"{where}.{part}: metric 'mean_accuracy' is the mean over tasks; name two or more in evaluate.tasks"
        elif metric in MEASURED_BY:
            yield from _unmeasured(metric, datasets, asked[MEASURED_BY[metric]], f"{where}.{part}", key)


def _twice(axes: list[str], where: str, places: str) -> Iterator[str]:
    for axis in dict.fromkeys(axis for axis in axes if axes.count(axis) > 1):
        yield f"{where}: axis '{axis}' is named twice; it has one place, in {places}"


def _unmeasured(metric: str, datasets: list[str], measured: list[str], where: str, key: str) -> Iterator[str]:
    evaluation = f"evaluate.{MEASURED_BY[metric]}"
    if not measured:
        needed = "a task" if metric == "accuracy" else "a corpus"
        yield f"{where}: metric '{metric}' is not measured in this study; name {needed} in {evaluation}"
    elif datasets and not set(datasets) & set(measured):
        yield f"{key}: metric '{metric}' is measured on none of {', '.join(datasets)}. Accepted: {', '.join(measured)}"
    elif where.endswith("figure") and not datasets and len(measured) > 1:
        yield f"{key}: metric '{metric}' is measured on several; name one of {', '.join(measured)}"
