"""Cells of the report's table and their cards: axes, costs, every measured number, the entries of the
config behind the names, and links to files of the results folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...config import entries
from ...config.cells import AXES, FULL_PRECISION, Cell
from ...config.deployments import ROUNDED
from ...plan.pipeline import Plan
from ..claims.headlines import accuracy, interval, perplexity
from ..data.evaluation_rows import cell_key
from ..data.records import RACE
from ..figures.pareto import BITS, DIVERGENCE, points
from ..style import metric_label, recipe_label, value_label, with_error

DEFINED = {"transform": "transforms", "mitigation": "mitigations", "format": "formats"}
FILTERED = ("model", "transform", "mitigation", "format")


def cell_lines(records: pd.DataFrame, formats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the cells of results.csv by divergence, one line per cell and corpus: the axes, labels
    of these, ``cell``, ``recipe``, ``deployment``, ``status``, and ``bits``, ``divergence``, ``perplexity``
    and ``accuracy`` as (text, sort value)."""
    marks = points(records, formats)
    places = {model: at for at, model in enumerate(dict.fromkeys(records.model))}
    ranked = marks.assign(at=marks.model.map(places), quantized=~marks.baseline)
    marks = ranked.sort_values(["at", "dataset", "quantized", "divergence"], kind="stable")
    errors = records[records.metric == "kl_divergence"].set_index(["cell", "dataset"]).stderr.to_dict()
    own = dict(list(records.groupby("cell", sort=False)))
    found = []
    for mark in marks.to_dict("records"):
        part, value = own[mark["cell"]], mark["divergence"]
        number = {"bits": (f"{mark['bits']:.2f}", mark["bits"])}
        number["divergence"] = (interval(value, errors[mark["cell"], mark["dataset"]]), value)
        number["perplexity"] = perplexity(mark["perplexity"], part, mark["dataset"])
        found.append({**named(mark, formats), "dataset": mark["dataset"], **number, "accuracy": accuracy(part)})
    shown = {line["cell"] for line in found}
    return found + [without_mark(part, formats) for cell, part in own.items() if cell not in shown]


def without_mark(part: pd.DataFrame, formats: Mapping[str, Any]) -> dict[str, Any]:
    """Build the line of a cell without a divergence on the windows of a study: that on the windows of a race,
    with their number, else dashes."""
    numbers = dict.fromkeys(("bits", "divergence", "perplexity", "accuracy"), ("–", math.nan))
    for value in part[part.metric == BITS].value:
        numbers["bits"] = (f"{value:.2f}", value)
    dataset = ""
    for row in part[part.metric == RACE + DIVERGENCE].head(1).to_dict("records"):
        text = f"{interval(row['value'], row['stderr'])}, on {row['count']:.0f} windows of a race"
        numbers["divergence"], dataset = (text, row["value"]), row["dataset"]
    return {**named(part.iloc[0].to_dict(), formats), "dataset": dataset, **numbers}


def named(cell: Mapping[str, Any], formats: Mapping[str, Any]) -> dict[str, Any]:
    """Name a cell for readers; ``cell`` has its key and axes."""
    axes = {axis: str(cell[axis]) for axis in AXES.values()}
    rounded, baseline = cell.get("rounded", ""), axes["format"] == FULL_PRECISION
    kind = ROUNDED[rounded] + (" + online" if cell["online"] else "") if rounded else ""
    plain = baseline and axes["transform"] == "none"
    label = "full precision" if plain else recipe_label(axes, formats)
    labels = {f"{axis}_label": value_label(axis, axes[axis]) for axis in FILTERED}
    found = {"cell": cell["cell"], **axes, **labels, "recipe": label, "deployment": kind, "baseline": plain}
    return {**found, "status": cell.get("status", "ok")}


def cards(records: pd.DataFrame, config: Mapping[str, Any], plan: Plan, base: Path) -> dict[str, dict[str, Any]]:
    """Map each cell to its card: ``title``, ``axes``, ``numbers`` (lists of metric, value and paired
    difference to full precision), ``entries`` (of the config), ``reason`` of a failure, and ``links``
    (text -> path below ``base``) to logs and evaluations that exist."""
    known = {cell_key(cell): cell for cell in plan.cells}
    found = {}
    for key, part in records.groupby("cell", sort=False):
        first = part.iloc[0]
        axes = {axis: str(first[axis]) for axis in AXES.values()}
        found[str(key)] = {
            "title": f"{first.model}: {recipe_label(axes, config['formats'])}",
            "axes": axes,
            "reason": "; ".join(reason for reason in dict.fromkeys(part.reason) if reason),
            "numbers": [numbers(row) for row in part.itertuples() if row.metric],
            "entries": {axis: entries.entry(config, plural, axes[axis]) for axis, plural in DEFINED.items()},
            "links": links(plan, known[str(key)], base) if str(key) in known else {},
        }
    return found


def numbers(row: Any) -> list[str]:
    """Format one record: metric with dataset, value with standard error, paired difference to full
    precision."""
    difference = with_error(row.difference, row.difference_stderr) if math.isfinite(row.difference) else ""
    return [metric_label(row.metric, row.dataset), with_error(row.value, row.stderr), difference]


def links(plan: Plan, cell: Cell, base: Path) -> dict[str, str]:
    """Link the logs and evaluations of a cell that exist below ``base``."""
    steps = [plan.quantize_model(cell)]
    paths: dict[str, str] = {}
    for study in plan.studies:
        for name, path in plan.possible_evaluations(study).get(cell, {}).items():
            paths[f"evaluation, {name}"] = path
    for step in steps:
        paths[f"log, {step.rule}"] = plan.logs(step.rule)["text"].format(**step.wildcards)
    if cell.transform != "none":
        step = plan.fit_transform(cell)
        paths[f"log, {step.rule}"] = plan.logs(step.rule)["text"].format(**step.wildcards)
    return {name: str(Path(path).relative_to(plan.results)) for name, path in paths.items() if exists(path, base, plan)}


def exists(path: str, base: Path, plan: Plan) -> bool:
    return (base / Path(path).relative_to(plan.results)).is_file()


def values(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """List the values of the filtered axes with their labels, in order of appearance."""
    return {axis: list(dict.fromkeys((line[axis], line[f"{axis}_label"]) for line in lines)) for axis in FILTERED}
