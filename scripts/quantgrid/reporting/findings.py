"""The verdicts on claims as the report shows them: a line per claim with a verdict for every model, all comparisons below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .style import significant

VERDICTS = ("holds", "does not hold", "undecided", "not measured")
SIGNS = dict(zip(VERDICTS, "✓✗?–"))
LARGEST = 5.0  # nats: beyond, a ratio of perplexities says no more than its exponent


def read(path: str | Path) -> list[dict[str, Any]]:
    """claims.csv by claim: claim, statement, paper, ``verdicts`` (model -> :func:`verdict`) and ``comparisons``, a line each.

    A claim about two models stands with the larger one, by which the other is named.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return [claim(part) for _, part in frame.groupby("claim", sort=False)]


def models(claims: Sequence[dict[str, Any]]) -> list[str]:
    """All models that a claim has a verdict for, in the order of the claim that has most."""
    longest = max(claims, key=lambda claim: len(claim["verdicts"]), default={"verdicts": {}})
    return list(dict.fromkeys([*longest["verdicts"], *(model for claim in claims for model in claim["verdicts"])]))


def counts(claims: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many verdicts of each kind there are, over claims and models."""
    given = [found["verdict"] for claim in claims for found in claim["verdicts"].values()]
    return {name: given.count(name) for name in VERDICTS if name in given}


def claim(part: pd.DataFrame) -> dict[str, Any]:
    first, verdicts = part.iloc[0], {}
    for model, own in part.groupby("model", sort=False):
        *smaller, larger = model.split(", ")
        verdicts[larger] = verdict(own, smaller)
    tested = [comparison(row) for row in part[part.effect != ""].itertuples()]
    summary = ", ".join(f"{name} on {count}" for name, count in counts([{"verdicts": verdicts}]).items())
    named = {name: getattr(first, name) for name in ("claim", "statement", "paper")}
    return {**named, "verdicts": verdicts, "comparisons": tested, "summary": summary}


def verdict(own: pd.DataFrame, smaller: Sequence[str]) -> dict[str, Any]:
    """A claim's verdict on one model (compared with the ``smaller`` one, if any), and the comparison that speaks least for it."""
    tested = own[own.effect != ""]
    name = own.iloc[0].verdict
    found = {"verdict": name, "sign": SIGNS[name], "against": ", ".join(smaller), "tested": len(tested),
             "start_kept": int(tested.reason.ne("").sum()), "counts": {kind: int((tested.outcome == kind).sum()) for kind in VERDICTS[:3]}}
    return {**found, "weakest": comparison(list(tested.itertuples())[weakest(tested)]) if len(tested) else None}


def weakest(tested: pd.DataFrame) -> int:
    """Position of the comparison that speaks least for the claim: its effect is nearest to the threshold, or furthest beyond it."""
    margins = (tested.effect.astype(float) - tested.threshold.astype(float)) * tested.side.map({"below": -1, "above": 1})
    return int(margins.to_numpy().argmin())


def comparison(row: Any) -> dict[str, Any]:
    """One comparison for readers: effect and interval as they were computed, and in words that say what they are of (``shown``)."""
    effect, low, high = float(row.effect), float(row.low), float(row.high)
    interval = "exact" if low == high else f"{significant(low)} to {significant(high)}" if math.isfinite(high - low) else "unknown"
    return {"model": row.model, "label": row.comparison, "dataset": row.dataset, "outcome": row.outcome, "reason": row.reason,
            "effect": (significant(effect), row.effect),
            "interval": interval, "shown": shown(effect, low, high, bool(row.dataset)),
            "wanted": f"{row.side} {float(row.threshold):g}", "p": (significant(float(row.p_adjusted), 2), row.p_adjusted), "cells": row.cells}


def shown(effect: float, low: float, high: float, of_losses: bool) -> str:
    """``−21.7 % of perplexity (−23.0 to −20.5)``: a difference of losses is the logarithm of a ratio of perplexities."""
    if not of_losses:
        return f"{effect:+.3g}"
    if abs(effect) > LARGEST or not math.isfinite(high - low) or max(abs(low), abs(high)) > LARGEST:
        return f"{effect:+.2f} nats" + (f" ({low:+.2f} to {high:+.2f})" if math.isfinite(high - low) else "")
    middle, least, most = (100 * math.expm1(value) for value in (effect, low, high))
    digits = 0 if abs(middle) >= 100 else 1
    return f"{middle:+.{digits}f} % ({least:+.{digits}f} to {most:+.{digits}f})".replace("-", "−")
