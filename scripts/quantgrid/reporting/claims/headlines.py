"""Recommended recipes of a whole run, for the first screen of the report: of every model, for each
kind of deployment and budget of bits, with its costs and what is as good and cheaper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ...config.deployments import Deployment
from ..data.starts import WORDS
from ..figures.pareto import DIVERGENCE, points
from ..style import CONFIDENCE, significant, with_error
from .recommendation import candidates, cheapest, kinds, recommend, within

BUDGETS = (2.5, 3.5, 4.25, 4.5, 5.0, 6.5, 8.5, math.inf)  # stored bits per weight
SHOWN = 5.0  # the budget that is shown first; the next that a recipe meets if none meets it
LOSS = "negative_log_likelihood"
ANY = "any"
TIMES = 3.0  # ratio of perplexities above which the ratio is shown instead of a percentage
LARGEST = 700.0  # nats: beyond, exp overflows


def headlines(records: pd.DataFrame, items: pd.DataFrame, formats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the recommended recipes, one dict per model, corpus, kind of deployment and budget that a
    recipe meets: ``model``, ``dataset``, ``deployment`` (title), ``kind`` (name), ``budget``, ``cell``,
    ``recipe``, and for readers ``bits``, ``divergence``, ``perplexity``, ``accuracy`` and ``cheaper``, each as
    (text, sort value).

    Budgets are those of ``BUDGETS`` from the first that any recipe of the run meets. A kind that allows
    online operations has no line where the best recipe needs none. ``records`` are those of results.csv,
    ``items`` the per-window values.
    """
    marks, items = points(records, formats), items[items.metric == DIVERGENCE]
    quantized, found = marks[~marks.baseline], []
    for model, dataset in quantized[["model", "dataset"]].drop_duplicates().itertuples(index=False):
        cells = candidates(records, formats, model, dataset)
        found += [
            headline(recommend(cells, items, kind, budget), records, dataset, kind, budget)
            for kind in kinds(cells)
            for budget in budgets(quantized)
            if len(within(cells, kind, budget))
        ]
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in found:
        kept.setdefault(_shown_once(line), line)
    return list(kept.values())


def _shown_once(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Key of a line, equal for the two kinds of deployment that recommend one cell within one budget; the
    first stays."""
    return line["dataset"], line["cell"], line["kind"].partition("+")[0], line["budget"]


def budgets(quantized: pd.DataFrame) -> list[float]:
    """List the budgets that separate the recipes of the run: from the first that one meets to the first
    that all meet."""
    bits = quantized.bits
    return [
        budget
        for before, budget in zip((0.0, *BUDGETS), BUDGETS)
        if (bits <= budget).any() and not (bits <= before).all()
    ]


def first_budget(found: list[dict[str, Any]]) -> str:
    """Name the budget that the report shows first: the largest up to ``SHOWN``, else the smallest."""
    values = sorted({line["budget"] for line in found}, key=float)
    return next((value for value in reversed(values) if float(value) <= SHOWN), values[0]) if values else ANY


def headline(
    found: pd.DataFrame, records: pd.DataFrame, dataset: str, kind: Deployment, budget: float
) -> dict[str, Any]:
    """Format the first recipe of a recommendation."""
    best, cheap = found.iloc[0], cheapest(found)
    own = records[records.cell == best.cell]
    return {
        "model": best.model,
        "dataset": dataset,
        "deployment": kind.title,
        "kind": kind.name,
        "budget": f"{budget:g}",
        "cell": best.cell,
        "recipe": best.recipe + (f" ({WORDS})" if best.start_kept else ""),
        "bits": (f"{best.bits:.2f}", best.bits),
        "divergence": (interval(best.divergence, best.stderr), best.divergence),
        "perplexity": perplexity(best.perplexity, own, dataset),
        "accuracy": accuracy(own),
        "cheaper": ("–", 0.0) if cheap["rank"] == 1 else (saving(best, cheap), float(cheap["rank"])),
    }


def interval(value: float, stderr: float) -> str:
    """Format a value with its 95 % interval: ``0.0214 (0.0208 to 0.0221)``."""
    if not stderr > 0:
        return significant(value)
    low, high = value - CONFIDENCE * stderr, value + CONFIDENCE * stderr
    return f"{significant(value)} ({significant(low)} to {significant(high)})"


def perplexity(value: float, own: pd.DataFrame, dataset: str) -> tuple[str, float]:
    """Format a perplexity and its change against full precision with its 95 % interval, paired by
    window: ``51.3, +1.4 % (+1.1 to +1.7)``."""
    row = own[(own.metric == LOSS) & (own.dataset == dataset)]
    if row.empty or not math.isfinite(row.difference.iloc[0]):
        return significant(value), value
    middle, error = float(row.difference.iloc[0]), float(row.difference_stderr.iloc[0])
    ratios = [math.exp(min(middle + side * CONFIDENCE * error, LARGEST)) for side in (0, -1, 1)]
    if ratios[0] > TIMES:
        shown = [significant(ratio) for ratio in ratios]
        return f"{significant(value)}, {shown[0]} × ({shown[1]} to {shown[2]})", value
    shown = [f"{100 * (ratio - 1):+.1f}".replace("-", "−") for ratio in ratios]
    return f"{significant(value)}, {shown[0]} % ({shown[1]} to {shown[2]})", value


def accuracy(own: pd.DataFrame) -> tuple[str, float]:
    """Format the mean accuracy over tasks, or that of a single task; a dash if none was measured."""
    for metric in ("mean_accuracy", "accuracy"):
        rows = own[own.metric == metric]
        if len(rows) == 1:
            row = rows.iloc[0]
            named = f", {row.dataset}" if row.dataset else ""
            return with_error(row.value, row.stderr) + named, row.value
    return "–", math.nan


def saving(best: pd.Series, cheap: pd.Series) -> str:
    """Format a recipe not significantly different from the best with its lower costs."""
    costs = [f"{cheap.bits:.2f} bits"]
    if cheap.operations != best.operations:
        costs.append(
            f"{significant(cheap.operations)} instead of {significant(best.operations)} online operations per token"
        )
    return f"{cheap.recipe}: {', '.join(costs)}"
