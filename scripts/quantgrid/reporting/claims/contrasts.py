"""Claims of the paper as contrasts of cells (``config/claims.yaml``), and the cells of a run that they
compare.

A claim is a contrast of losses, ``sum of weight x negative log-likelihood`` (nats per token), and
the side of a threshold on which its mean should lie. For two cells the contrast is the logarithm of
the ratio of their perplexities. All terms share every axis that no term names, so a claim has one
comparison for each combination of shared axes in the results; an axis that some term names may
differ, and a term that does not name it takes any value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pandas as pd

from ...config import entries, validation
from ...ground.errors import ConfigError, unknown_name
from ...ground.places import ROOT
from ...machine.memory import parameters
from ..data.records import AXES, is_baseline

FILE = ROOT / "config" / "claims.yaml"
KEYS = ("statement", "paper", "where", "terms", "contrasts", "ladder", "below", "above", "across", "metric", "note")
TERM_KEYS = ("weight", "baseline", *AXES)
LOSS, DIVERGENCE = "negative_log_likelihood", "kl_divergence"
# largest differences that count as equal
MARGINS = {LOSS: "a difference in nats per token", DIVERGENCE: "a share of the mean divergence"}
# values of a term's model, for each pair of models adjacent in size
SIZES = ("smaller", "larger")


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


def margins(path: str | Path = FILE) -> dict[str, float]:
    """Read the margins of equality of the claims file, by metric; :class:`ConfigError` names the
    key."""
    found = validation.read(path).get("equal") or {}
    for metric, margin in found.items():
        if metric not in MARGINS:
            raise ConfigError(f"{path}: equal: {unknown_name('metric', metric, list(MARGINS))}")
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 < margin < 1:
            raise ConfigError(f"{path}: equal.{metric}: needs a number between 0 and 1, {MARGINS[metric]}")
    return {metric: float(margin) for metric, margin in found.items()}


def metrics(claim: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics on which a claim is tested."""
    return (claim["metric"],) if "metric" in claim else (LOSS, DIVERGENCE)


def contrasts(claim: Mapping[str, Any], present: Sequence[str]) -> list[list[dict[str, Any]]]:
    """List the contrasts of a claim as lists of terms; a ladder gives the differences, later minus
    earlier, of neighbours among its values that are ``present``."""
    if "ladder" not in claim:
        return [claim["terms"]] if "terms" in claim else claim["contrasts"]
    ((axis, values),) = claim["ladder"].items()
    steps = [value for value in values if value in present]
    return [[{"weight": 1, axis: finer}, {"weight": -1, axis: coarser}] for coarser, finer in pairwise(steps)]


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
