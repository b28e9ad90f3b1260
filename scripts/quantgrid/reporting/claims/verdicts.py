"""Tests of claims (``config/claims.yaml``): contrasts of cells, tested over their common windows.

``contrasts.py`` finds the comparisons. Cells of one model are paired window by window; two models
are independent. A claim about losses is tested a second time on the divergence from full precision,
with the same terms and threshold: both are nats per token, and the divergence varies far less from
window to window.

Each comparison has a 95 % bootstrap interval and a p-value (``paired.py``), Holm-adjusted over all
comparisons of a model and metric. It is decided if the interval lies on one side of the threshold
and the adjusted p-value is below 0.05. Else, where the threshold is zero, it is *equal* if the
interval lies within the margin that the claims file fixes for the metric (the two one-sided tests of
Schuirmann, 1987, each at 2.5 %). ``detectable`` is the difference from the threshold that such a comparison
decides with a power of 80 %. A comparison with a cell whose training kept its start stays undecided,
with that as its reason: the cell is not what its name says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from ..data.naming import names
from ..data.paired import LEVEL, certain, estimate, holm
from ..data.records import AXES
from ..data.starts import WORDS, kept
from .contrasts import DIVERGENCE, Comparison, by_size, contrasts, fitting, matched, metrics, models_of

POWER = 0.8
COLUMNS = (
    "claim",
    "statement",
    "paper",
    "model",
    "verdict",
    "comparison",
    "metric",
    "dataset",
    "effect",
    "low",
    "high",
    "threshold",
    "side",
    "margin",
    "detectable",
    "p",
    "p_adjusted",
    "outcome",
    "count",
    "cells",
    "reason",
)


def evaluate(
    claims: Mapping[str, Mapping[str, Any]],
    equal: Mapping[str, float],
    records: pd.DataFrame,
    items: pd.DataFrame,
    config: Mapping[str, Any],
) -> pd.DataFrame:
    """Evaluate all comparisons of all claims, one row each (``COLUMNS``), with the verdict of their
    claim on their model and metric.

    ``equal`` are the margins of equality by metric, ``records`` are those of results.csv, ``items``
    the per-window and per-sample values (cell, metric, dataset, item, value). A claim without
    matching cells of a model is one row with the verdict ``not measured``.
    """
    cells = records[records.status == "ok"].drop_duplicates("cell")
    values = {
        key: part.sort_values("item").value.to_numpy()
        for key, part in items.groupby(["cell", "metric", "dataset"], sort=False)
    }
    values |= {
        (row.cell, row.metric, ""): np.array([row.value])
        for row in records[records.dataset == ""].itertuples()
        if row.metric
    }
    marked = kept(records)
    called = {(axis, value): names(config, axis, value) for axis in AXES for value in cells[axis].unique()}
    ordered = by_size(config, list(cells.model.unique()))
    rows: list[dict[str, Any]] = []
    for name, claim in claims.items():
        for model, group in models_of(claim, ordered):
            own = cells[cells.model.isin(group)]
            fit = fitting(claim.get("where", {}), own, called, group)
            present = [value for axis in claim.get("ladder", {}) for value in fit[axis].unique()]
            found = (
                [
                    comparison
                    for contrast in contrasts(claim, present)
                    for comparison in matched(claim, contrast, own, called, group)
                ]
                if group
                else []
            )
            common = {"claim": name, "statement": claim["statement"], "paper": claim.get("paper", ""), "model": model}
            tested = [
                row
                for metric in metrics(claim)
                for comparison in found
                for row in tests(comparison, claim, metric, values, marked, equal.get(metric))
            ]
            rows += [{**common, **row} for row in tested] or [{**common, "verdict": "not measured"}]
    return judged(pd.DataFrame(rows, columns=list(COLUMNS)), claims)


def tests(
    comparison: Comparison,
    claim: Mapping[str, Any],
    metric: str,
    values: Mapping[tuple[str, str, str], np.ndarray],
    marked: set[str],
    margin: float | None,
) -> Iterator[dict[str, Any]]:
    """Test a comparison on each dataset on which all its cells were measured, one row each; a
    constant (bits) has no dataset and no spread."""
    cells = [cell for _, cell, _ in comparison.terms]
    datasets = [{dataset for cell, name, dataset in values if cell == own and name == metric} for own in cells]
    side = "below" if "below" in claim else "above"
    starts = " ".join(cell for cell in dict.fromkeys(cells) if cell in marked)
    reason = f"{WORDS}: {starts}" if starts else ""
    for dataset in sorted(set.intersection(*datasets)):
        parts: dict[str, np.ndarray] = {}
        for weight, cell, model in comparison.terms:
            parts[model] = parts.get(model, 0.0) + weight * values[cell, metric, dataset]
        differences = list(parts.values())
        effect, low, high, p = (
            estimate(differences, claim[side])
            if dataset
            else certain(float(sum(map(np.sum, differences))), claim[side])
        )
        yield {
            "comparison": comparison.label,
            "metric": metric,
            "dataset": dataset,
            "effect": effect,
            "low": low,
            "high": high,
            "threshold": claim[side],
            "side": side,
            "margin": margin_of(comparison, metric, dataset, values, margin) if margin and not claim[side] else None,
            "p": p,
            "count": min(map(len, parts.values())),
            "cells": " ".join(cells),
            "reason": reason,
        }


def margin_of(
    comparison: Comparison,
    metric: str,
    dataset: str,
    values: Mapping[tuple[str, str, str], np.ndarray],
    margin: float,
) -> float:
    """Return the largest difference of ``metric`` that counts as equal, in its unit."""
    if metric != DIVERGENCE:
        return margin
    sizes = [(abs(weight), values[cell, metric, dataset].mean()) for weight, cell, _ in comparison.terms]
    return margin * float(sum(weight * mean for weight, mean in sizes) / sum(weight for weight, _ in sizes))


def judged(rows: pd.DataFrame, claims: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Add adjusted p-values and detectable differences, an outcome for each comparison, and a
    verdict for each claim, model and metric."""
    rows = rows.astype({"p_adjusted": "float64", "detectable": "float64", "outcome": object, "verdict": object})
    tested = rows[rows.effect.notna()]
    for _, part in tested.groupby(["model", "metric"], sort=False):
        rows.loc[part.index, "p_adjusted"] = holm(part.p.tolist())
        rows.loc[part.index, "detectable"] = (part.high - part.low) * detectable_widths(len(part))
    for at in tested.index:
        rows.loc[at, "outcome"] = outcome(rows.loc[at])
    for (name, _, _), part in rows.loc[tested.index].groupby(["claim", "model", "metric"], sort=False):
        rows.loc[part.index, "verdict"] = verdict(list(part.outcome), claims[name].get("across", "every"))
    return rows


def detectable_widths(comparisons: int) -> float:
    """Return the difference detected with probability ``POWER`` in a family of ``comparisons``, in
    widths of its 95 % interval (normal approximation, the first step of Holm)."""
    normal = NormalDist()
    wanted = normal.inv_cdf(1 - LEVEL / 2 / comparisons) + normal.inv_cdf(POWER)
    return wanted / (2 * normal.inv_cdf(1 - LEVEL / 2))


def outcome(row: Any) -> str:
    """Return ``holds`` or ``does not hold`` if interval and adjusted p-value decide and no cell
    kept its start; else ``equal`` if the interval lies within the margin, or ``undecided``."""
    if row.reason:
        return "undecided"
    if not row.p_adjusted < LEVEL or row.low <= row.threshold <= row.high:
        within = pd.notna(row.margin) and -row.margin <= row.low and row.high <= row.margin
        return "equal" if within else "undecided"
    return "holds" if (row.effect < row.threshold) == (row.side == "below") else "does not hold"


def verdict(outcomes: Sequence[str], across: str) -> str:
    """Combine outcomes into the verdict of a claim about every comparison, or about some.

    A claim about every comparison that holds in some and is equal in the others ``holds in part``; a
    claim about some that nowhere holds and somewhere is refuted ``does not hold``.
    """
    found = set(outcomes)
    decided, refuted = ("does not hold", "holds") if across == "every" else ("holds", "does not hold")
    if decided in found:
        return decided
    if len(found) == 1:
        return found.pop()
    if found == {refuted, "equal"}:
        return "holds in part" if across == "every" else refuted
    return "undecided"
