"""Tests of claims (``config/claims.yaml``): contrasts of cells, tested over their common windows.

A claim is a contrast of losses, ``sum of weight x negative log-likelihood`` (nats per token), and
the side of a threshold on which its mean should lie. For two cells the contrast is the logarithm of
the ratio of their perplexities. All terms share every axis that no term names, so a claim has one
comparison for each combination of shared axes (and for each corpus) in the results; an axis that
some term names may differ, and a term that does not name it takes any value. Cells of one model are
paired window by window; two models are independent.

Each comparison has a 95 % bootstrap interval and a p-value (``paired.py``), Holm-adjusted over all
comparisons of a model. It is decided if the interval lies on one side of the threshold and the
adjusted p-value is below 0.05. A comparison with a cell whose training kept its start stays
undecided, with that as its reason: the cell is not what its name says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...config import entries, validation
from ...ground.errors import ConfigError, unknown_name
from ...ground.places import ROOT
from ...machine.memory import parameters
from ..data.naming import names
from ..data.paired import LEVEL, certain, estimate, holm
from ..data.records import AXES, is_baseline
from ..data.starts import WORDS, kept

FILE = ROOT / "config" / "claims.yaml"
KEYS = ("statement", "paper", "where", "terms", "contrasts", "ladder", "below", "above", "across", "metric", "note")
TERM_KEYS = ("weight", "baseline", *AXES)
LOSS = "negative_log_likelihood"
# values of a term's model, for each pair of models adjacent in size
SIZES = ("smaller", "larger")
COLUMNS = (
    "claim",
    "statement",
    "paper",
    "model",
    "verdict",
    "comparison",
    "dataset",
    "effect",
    "low",
    "high",
    "threshold",
    "side",
    "p",
    "p_adjusted",
    "outcome",
    "count",
    "cells",
    "reason",
)


@dataclass(frozen=True)
class Comparison:
    """One contrast: its label, and its ``terms`` as (weight, cell key, model)."""

    label: str
    terms: tuple[tuple[float, str, str], ...]


def read(path: str | Path = FILE) -> dict[str, dict[str, Any]]:
    """Read and check the claims: name -> content; :class:`ConfigError` names the claim and the
    key."""
    claims = validation.read(path).get("claims") or {}
    for name, claim in claims.items():
        where = f"{path}: claims.{name}"
        for key in claim:
            if key not in KEYS:
                raise ConfigError(f"{where}: {unknown_name('key', key, KEYS)}")
        if (
            sum(key in claim for key in ("terms", "contrasts", "ladder")) != 1
            or sum(key in claim for key in ("below", "above")) != 1
        ):
            raise ConfigError(f"{where}: needs one of terms, contrasts and ladder, and one of below and above")
        if claim.get("across", "every") not in ("every", "some") or "statement" not in claim:
            raise ConfigError(f"{where}: needs a statement; across is 'every' or 'some'")
        for term in [claim.get("where", {}), *(term for contrast in contrasts(claim, []) for term in contrast)]:
            if unknown := [key for key in term if key not in TERM_KEYS]:
                raise ConfigError(f"{where}: {unknown_name('key', unknown[0], TERM_KEYS)}")
    return claims


def contrasts(claim: Mapping[str, Any], present: Sequence[str]) -> list[list[dict[str, Any]]]:
    """List the contrasts of a claim as lists of terms; a ladder gives the differences, later minus
    earlier, of neighbours among its values that are ``present``."""
    if "ladder" not in claim:
        return [claim["terms"]] if "terms" in claim else claim["contrasts"]
    ((axis, values),) = claim["ladder"].items()
    steps = [value for value in values if value in present]
    return [[{"weight": 1, axis: finer}, {"weight": -1, axis: coarser}] for coarser, finer in pairwise(steps)]


def evaluate(
    claims: Mapping[str, Mapping[str, Any]], records: pd.DataFrame, items: pd.DataFrame, config: Mapping[str, Any]
) -> pd.DataFrame:
    """Evaluate all comparisons of all claims, one row each (``COLUMNS``), with the verdict of their
    claim on their model.

    ``records`` are those of results.csv, ``items`` the per-window and per-sample values (cell,
    metric, dataset, item, value). A claim without matching cells of a model is one row with the
    verdict ``not measured``.
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
        metric = claim.get("metric", LOSS)
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
            tested = [row for comparison in found for row in tests(comparison, claim, metric, values, marked)]
            rows += [{**common, **row} for row in tested] or [{**common, "verdict": "not measured"}]
    return judged(pd.DataFrame(rows, columns=list(COLUMNS)), claims)


def by_size(config: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Sort models by their number of weights, the smallest first."""
    return sorted(models, key=lambda model: parameters(entries.shape(config, model)))


def models_of(claim: Mapping[str, Any], ordered: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """List the (label, models) for which a claim is evaluated: each model, or each pair adjacent in
    size; size is not compared with a single model."""
    if any(term.get("model") in SIZES for contrast in contrasts(claim, []) for term in contrast):
        return [(f"{small}, {large}", (small, large)) for small, large in pairwise(ordered)] or [
            (", ".join(ordered), ())
        ]
    return [(model, (model,)) for model in ordered]


def matched(
    claim: Mapping[str, Any],
    contrast: Sequence[Mapping[str, Any]],
    cells: pd.DataFrame,
    called: Mapping[tuple[str, str], set[str]],
    group: Sequence[str],
) -> Iterator[Comparison]:
    """Match the terms of one contrast to cells that agree in the axes that no term names, in every
    possible way."""
    placed = {axis for term in contrast for axis in term if axis in AXES}
    shared = [axis for axis in AXES if axis not in placed]
    candidates = [fitting({**claim.get("where", {}), **term}, cells, called, group) for term in contrast]
    for filled in product(*(list(part.itertuples()) for part in candidates)):
        compared = [row for term, row in zip(contrast, filled) if not term.get("baseline")]
        if len({tuple(getattr(row, axis) for axis in shared) for row in compared}) == 1:
            terms = tuple((term["weight"], row.cell, row.model) for term, row in zip(contrast, filled))
            text = ", ".join(dict.fromkeys(getattr(compared[0], axis) for axis in shared if axis != "model"))
            sides = "; ".join(
                f"{'+' if term['weight'] > 0 else '−'} {' '.join(described(term, row, placed))}"
                for term, row in zip(contrast, filled)
            )
            yield Comparison(f"{text}: {sides}" if text else sides, terms)


def described(term: Mapping[str, Any], row: Any, placed: set[str]) -> list[str]:
    return (
        [row.model, "full precision"]
        if term.get("baseline")
        else [getattr(row, axis) for axis in AXES if axis in placed]
    )


def fitting(
    pattern: Mapping[str, Any], cells: pd.DataFrame, called: Mapping[tuple[str, str], set[str]], group: Sequence[str]
) -> pd.DataFrame:
    """List the cells that match a term; full-precision cells only for a term that asks for them."""
    model = pattern.get("model")
    if model in SIZES:
        cells = cells[cells.model == group[SIZES.index(model)]]
    if pattern.get("baseline"):
        return cells[is_baseline(cells)]
    cells = cells[cells.mitigation != "none"]
    for axis in AXES:
        wanted = pattern.get(axis)
        if wanted is None or wanted == "any" or wanted in SIZES:
            continue
        accepted = {str(value).lower() for value in (wanted if isinstance(wanted, list) else [wanted])}
        cells = cells[
            cells[axis]
            .map(lambda value, axis=axis, accepted=accepted: bool(called[axis, value] & accepted))
            .astype(bool)
        ]
    return cells


def tests(
    comparison: Comparison,
    claim: Mapping[str, Any],
    metric: str,
    values: Mapping[tuple[str, str, str], np.ndarray],
    marked: set[str],
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
            "dataset": dataset,
            "effect": effect,
            "low": low,
            "high": high,
            "threshold": claim[side],
            "side": side,
            "p": p,
            "count": min(map(len, parts.values())),
            "cells": " ".join(cells),
            "reason": reason,
        }


def judged(rows: pd.DataFrame, claims: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Add adjusted p-values, an outcome for each comparison, and a verdict for each claim and
    model."""
    rows = rows.astype({"p_adjusted": "float64", "outcome": object, "verdict": object})
    tested = rows[rows.effect.notna()]
    for _, part in tested.groupby("model", sort=False):
        rows.loc[part.index, "p_adjusted"] = holm(part.p.tolist())
    for at in tested.index:
        rows.loc[at, "outcome"] = outcome(rows.loc[at])
    for (name, _), part in rows.loc[tested.index].groupby(["claim", "model"], sort=False):
        rows.loc[part.index, "verdict"] = verdict(list(part.outcome), claims[name].get("across", "every"))
    return rows


def outcome(row: Any) -> str:
    """Return ``holds`` or ``does not hold`` if interval and adjusted p-value decide and no cell
    kept its start, else ``undecided``."""
    if row.reason or not row.p_adjusted < LEVEL or row.low <= row.threshold <= row.high:
        return "undecided"
    return "holds" if (row.effect < row.threshold) == (row.side == "below") else "does not hold"


def verdict(outcomes: Sequence[str], across: str) -> str:
    """Combine outcomes into the verdict of a claim about every comparison, or about some."""
    decided, refuted = ("does not hold", "holds") if across == "every" else ("holds", "does not hold")
    if decided in outcomes:
        return decided
    return refuted if set(outcomes) == {refuted} else "undecided"
