"""Verdicts on claims for the report: a line per claim with a verdict for every model, then all
comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..style import significant
from .contrasts import DIVERGENCE, LOSS

VERDICTS = ("holds", "holds in part", "does not hold", "equal", "undecided", "not measured")
SIGNS = dict(zip(VERDICTS, "✓◐✗=?–"))
OUTCOMES = ("holds", "does not hold", "equal", "undecided")  # of one comparison
LARGEST = 5.0  # nats; above, the ratio of perplexities is shown as a power


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read claims.csv by claim and metric: claim, statement, paper, ``verdicts`` (model ->
    :func:`verdict`) and ``comparisons``, a line each.

    The statement of a claim tested on divergence says so. A claim about two models is listed under
    the larger one, labelled with the smaller.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    measured = frame[frame.metric != ""].groupby("claim").metric.first()
    frame["metric"] = frame.metric.where(frame.metric != "", frame.claim.map(measured).astype(object).fillna(LOSS))
    return [claim(part) for _, part in frame.groupby(["claim", "metric"], sort=False)]


def judged(claims: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the claims that the run can judge: those with a comparison on some model, with the verdicts
    on these models."""
    found = []
    for claim in claims:
        known = {model: own for model, own in claim["verdicts"].items() if own["verdict"] != VERDICTS[-1]}
        if known:
            found.append({**claim, "verdicts": known, "summary": summary(known)})
    return found


def models(claims: Sequence[dict[str, Any]]) -> list[str]:
    """List all models with a verdict of any claim, in the order of the claim with the most."""
    longest = max(claims, key=lambda claim: len(claim["verdicts"]), default={"verdicts": {}})
    return list(dict.fromkeys([*longest["verdicts"], *(model for claim in claims for model in claim["verdicts"])]))


def counts(claims: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count the verdicts of each kind over claims and models."""
    given = [found["verdict"] for claim in claims for found in claim["verdicts"].values()]
    return {name: given.count(name) for name in VERDICTS if name in given}


def claim(part: pd.DataFrame) -> dict[str, Any]:
    first, verdicts = part.iloc[0], {}
    for model, own in part.groupby("model", sort=False):
        *smaller, larger = model.split(", ")
        verdicts[larger] = verdict(own, smaller)
    tested = [comparison(row) for row in part[part.effect != ""].itertuples()]
    named = {name: getattr(first, name) for name in ("claim", "statement", "paper")}
    if first.metric == DIVERGENCE:
        named["statement"] += " (by divergence)"
    return {**named, "verdicts": verdicts, "comparisons": tested, "summary": summary(verdicts)}


def summary(verdicts: dict[str, Any]) -> str:
    return ", ".join(f"{name} on {count}" for name, count in counts([{"verdicts": verdicts}]).items())


def verdict(own: pd.DataFrame, smaller: Sequence[str]) -> dict[str, Any]:
    """Summarize a claim's verdict on one model (compared with the ``smaller`` one, if any) and its
    weakest comparison."""
    tested = own[own.effect != ""]
    name = own.iloc[0].verdict
    found = {
        "verdict": name,
        "sign": SIGNS[name],
        "against": ", ".join(smaller),
        "tested": len(tested),
        "start_kept": int(tested.reason.ne("").sum()),
        "counts": {kind: int((tested.outcome == kind).sum()) for kind in OUTCOMES},
    }
    return {**found, "weakest": comparison(list(tested.itertuples())[weakest(tested)]) if len(tested) else None}


def weakest(tested: pd.DataFrame) -> int:
    """Find the position of the weakest comparison of the claim: its effect is nearest to the
    threshold, or furthest beyond it."""
    margins = (tested.effect.astype(float) - tested.threshold.astype(float)) * tested.side.map(
        {"below": -1, "above": 1}
    )
    return int(margins.to_numpy().argmin())


def comparison(row: Any) -> dict[str, Any]:
    """Format one comparison: effect and interval as computed, and in words with the quantity named
    (``shown``)."""
    effect, low, high = float(row.effect), float(row.low), float(row.high)
    interval = (
        "exact"
        if low == high
        else f"{significant(low)} to {significant(high)}"
        if math.isfinite(high - low)
        else "unknown"
    )
    return {
        "model": row.model,
        "label": row.comparison,
        "dataset": row.dataset,
        "outcome": row.outcome,
        "reason": row.reason,
        "effect": (significant(effect), row.effect),
        "interval": interval,
        "shown": shown(effect, low, high, row.metric),
        "margin": significant(float(row.margin)) if row.margin else "",
        "detectable": significant(float(row.detectable)) if row.dataset else "",
        "wanted": f"{row.side} {float(row.threshold):g}",
        "p": (significant(float(row.p_adjusted), 2), row.p_adjusted),
        "cells": row.cells,
    }


def shown(effect: float, low: float, high: float, metric: str) -> str:
    """Format an effect: ``−21.7 % of perplexity (−23.0 to −20.5)``; a difference of losses is the
    logarithm of a ratio of perplexities. Differences of divergences are in nats."""
    if metric not in (LOSS, DIVERGENCE):
        return f"{effect:+.3g}"
    if metric == DIVERGENCE:
        between = f" ({low:+.2g} to {high:+.2g})" if math.isfinite(high - low) else ""
        return f"{effect:+.3g} nats{between}".replace("-", "−")
    if abs(effect) > LARGEST or not math.isfinite(high - low) or max(abs(low), abs(high)) > LARGEST:
        return f"{effect:+.2f} nats" + (f" ({low:+.2f} to {high:+.2f})" if math.isfinite(high - low) else "")
    middle, least, most = (100 * math.expm1(value) for value in (effect, low, high))
    digits = 0 if abs(middle) >= 100 else 1
    return f"{middle:+.{digits}f} % ({least:+.{digits}f} to {most:+.{digits}f})".replace("-", "−")
