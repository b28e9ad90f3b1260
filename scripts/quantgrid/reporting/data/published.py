"""Comparison with published numbers (``config/published.csv``), for studies whose ``paper`` names a
table of arXiv 2507.17417.

A gap is given if model, corpus and window are the published ones. On another model absolute numbers
are not comparable; the ratios to full precision (differences, for accuracies) are compared instead.

Columns of the file: source, table, model, bits, the axes, symmetry, metric, dataset, window, value,
confidence, protocol. In rows of that paper the axes are methods, granularities and formats with the names
of quantgrid and ``config/paper.yaml``, and accuracies are in percent; rows of other sources keep the
words of their sources. ``confidence`` is high (read in the source's text, or by two independent
readers) or medium, ``protocol`` what else the source states.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...ground.errors import ConfigError
from ...ground.places import ROOT
from .naming import names
from .records import AXES, is_baseline, tidy

FILE = ROOT / "config" / "published.csv"
PAPER = "arXiv:2507.17417"
COLUMNS = ("source", "table", "model", *AXES[1:], "metric", "dataset", "window", "value", "confidence")
RECIPE = AXES[1:]


def read(path: str | Path = FILE) -> pd.DataFrame:
    """Read the published rows, texts unchanged and ``value`` as float64; :class:`ConfigError` for a
    file of another kind."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if absent := [name for name in COLUMNS if name not in frame]:
        raise ConfigError(f"{path}: no column {', '.join(absent)}; accepted are {', '.join(COLUMNS)}")
    return frame.assign(value=pd.to_numeric(frame.value))


def tables_named(paper: str) -> list[str]:
    """Parse table numbers: ``Tables VI and VIII`` -> [VI, VIII]."""
    return re.findall(r"\b[IVX]+\b", paper)


def with_measured(
    records: pd.DataFrame, study: Mapping[str, Any], config: Mapping[str, Any], published: pd.DataFrame
) -> list[dict[str, Any]]:
    """Build one dict for each published row with a measured cell of the study: recipe, metric, the
    published value and its model, the measured value, both relative to full precision, and the gap
    (None if model or protocol differ). Failed cells give none."""
    wanted = tables_named(study.get("paper", ""))
    own = published[(published.source == PAPER) & (published.mitigation != "none")]
    own = own[own.table.map(lambda table: bool({*table.split(", ")} & {*wanted}))].drop_duplicates(
        [*RECIPE, "model", "metric", "dataset"]
    )
    records = tidy(records)
    called = {(axis, value): names(config, axis, value) for axis in AXES for value in records[axis].unique()}
    return [line for row in own.itertuples() for line in lines(row, records, called, published)]


def lines(
    row: Any, records: pd.DataFrame, called: Mapping[tuple[str, str], set[str]], published: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    """Find the measured cells with the recipe of a published row, on its model if that was
    measured, else on every model."""
    fits = records[records.metric == row.metric]
    for axis in RECIPE:
        fits = fits[
            fits[axis].map(lambda value, axis=axis: getattr(row, axis).lower() in called[axis, value]).astype(bool)
        ]
    if row.metric == "accuracy":
        fits = fits[fits.dataset == row.dataset]
    same = fits.model.map(lambda model: row.model.lower() in called["model", model]).astype(bool)
    paper = published[(published.source == PAPER) & (published.mitigation == "none")]
    reference = paper[(paper.model == row.model) & (paper.metric == row.metric)]
    for cell in fits[same if same.any() else slice(None)].itertuples():
        alike = bool(same[cell.Index]) and same_protocol(row, cell)
        own = records[
            is_baseline(records)
            & (records.model == cell.model)
            & (records.metric == cell.metric)
            & (records.dataset == cell.dataset)
        ]
        value = cell.value if row.metric == "perplexity" else 100 * cell.value
        full = own.value.iloc[0] * (1 if row.metric == "perplexity" else 100) if len(own) else math.nan
        known = reference.value.iloc[0] if len(reference) else math.nan
        yield {
            **{axis: getattr(cell, axis) for axis in RECIPE},
            "metric": row.metric,
            "table": row.table,
            "confidence": row.confidence,
            "published_model": row.model,
            "published": row.value,
            "published_relative": relative(row.metric, row.value, known),
            "measured_model": cell.model,
            "dataset": cell.dataset,
            "start_kept": cell.start_kept == "all",
            "measured": value,
            "measured_relative": relative(row.metric, value, full),
            "gap": (value / row.value - 1 if row.metric == "perplexity" else value - row.value) if alike else None,
        }


def relative(metric: str, value: float, full: float) -> float:
    """Express a perplexity as a multiple of full precision, an accuracy as points above it."""
    return value / full if metric == "perplexity" else value - full


def same_protocol(row: Any, cell: Any) -> bool:
    """Check whether a measured cell has the corpus and window of a published row; for tasks, the
    same task or list of tasks."""
    protocol = json.loads(cell.protocol) if cell.protocol else {}
    if row.metric == "mean_accuracy":
        return set(protocol.get("tasks", {})) == set(row.dataset.split())
    if row.metric == "accuracy":
        return cell.dataset == row.dataset
    return cell.dataset == row.dataset and str(protocol.get("window")) == row.window
