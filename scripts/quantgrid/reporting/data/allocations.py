"""Allocations of bits: predicted and measured divergence, and the best uniform scheme within the budget.

Divergences are paired by window. The prediction is good where errors of linears add up; it is marked
where the measured divergence differs from it by more than a factor of ``FACTOR``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...config import allocations, entries
from ...config.cells import Cell
from ...models.plans import LINEARS
from ...models.shapes import ModelShape
from ..style import recipe_label, significant
from .paired import LEVEL, estimate

FACTOR = 1.5  # between predicted and measured divergence, beyond which the prediction is marked
ADDITIVE = 0.3  # nats per token of predicted divergence, beyond which errors of linears do not add up
BETTER, TIED, WORSE = "better", "not told apart", "worse"
Evaluations = Mapping[Cell, Mapping[str, Mapping[str, Any]]]


def confirmed(difference: float, low: float, high: float, p: float) -> str:
    """Verdict on a paired difference of divergences to the uniform scheme, with its 95 % interval and p-value."""
    if p >= LEVEL or low <= 0 <= high:
        return TIED
    return BETTER if difference < 0 else WORSE


def lines(config: Mapping[str, Any], evaluations: Sequence[Evaluations]) -> list[dict[str, Any]]:
    """One line per allocated cell and corpus of the studies, each cell once.

    ``recipe``, ``corpus``, ``limit`` (text), ``target``, ``bits``, ``schemes`` (name -> share of the weights),
    ``predicted``, ``measured``, ``factor`` (measured over predicted), ``marked`` (reason to distrust the
    prediction, or empty), ``uniform`` (recipe of the best uniform scheme within the budget, or empty),
    ``uniform_bits``, ``uniform_measured``, ``difference`` (text) and ``verdict``; ``layers`` with the
    ``groups`` of linears holds the scheme of every group of every layer, ``shades`` maps schemes to percent.
    """
    found: dict[tuple[Cell, str], dict[str, Any]] = {}
    for study in evaluations:
        for cell, own in study.items():
            if "allocation" in own.get("error", {}):
                for corpus in _corpora(own):
                    found.setdefault((cell, corpus), _line(config, study, cell, corpus))
    return list(found.values())


def _corpora(own: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, content in own.items():
        kind, _, dataset = name.partition(".")
        if kind == "perplexity" and content["status"] == "ok":
            yield dataset


def _line(config: Mapping[str, Any], study: Evaluations, cell: Cell, corpus: str) -> dict[str, Any]:
    content, given = study[cell]["error"], allocations.allocation_of(config, cell)
    allocation, measured = content["allocation"], divergences(study[cell], corpus)
    predicted, mean = allocation["predicted_kl"], float(measured.mean())
    sizes: Counter[str] = Counter()
    for linear, name in allocation["schemes"].items():
        sizes[name] += content["linears"][linear]["size"]
    limit = f"{given['budget']:g} bits" if given["budget"] is not None else f"predicted {given['divergence']:g} nats"
    return {
        "recipe": recipe_label(cell.axes, config["formats"]),
        "model": cell.model,
        "corpus": corpus,
        "limit": limit,
        "target": given["target"],
        "bits": content["summary"]["stored_bits"],
        "schemes": {name: size / sizes.total() for name, size in sizes.most_common()},
        "predicted": predicted,
        "measured": mean,
        "factor": mean / predicted if predicted else float("inf"),
        "marked": distrusted(predicted, mean),
        **_beside_uniform(config, study, cell, corpus, measured),
        "shades": shades(allocation["uniform"]),
        **layers_of(entries.shape(config, cell.model), allocation["schemes"]),
    }


def divergences(own: Mapping[str, Mapping[str, Any]], corpus: str) -> np.ndarray:
    """Divergence of every window of a cell on a corpus."""
    return np.asarray(own[f"perplexity.{corpus}"]["windows"]["kl_divergence"])


def distrusted(predicted: float, measured: float) -> str:
    """Reason to distrust a predicted divergence, or nothing."""
    if predicted > ADDITIVE:
        return f"errors of linears do not add up above {ADDITIVE:g} nats"
    if not predicted / FACTOR <= measured <= predicted * FACTOR:
        return f"off by more than {FACTOR:g}"
    return ""


def _beside_uniform(
    config: Mapping[str, Any], study: Evaluations, cell: Cell, corpus: str, measured: np.ndarray
) -> dict[str, Any]:
    """Columns of the uniform cell of smallest divergence within the budget, or else the bits of the allocation."""
    limit = allocations.allocation_of(config, cell)["budget"] or study[cell]["error"]["summary"]["stored_bits"]
    uniform = {
        other: divergences(study[other], corpus)
        for other in allocations.uniform_cells(config, cell)
        if other in study
        and corpus in _corpora(study[other])
        and "summary" in study[other].get("error", {})
        and study[other]["error"]["summary"]["stored_bits"] <= limit
    }
    if not uniform:
        empty = {
            "uniform": "",
            "uniform_bits": None,
            "uniform_measured": None,
            "difference": "",
            "verdict": "not compared",
        }
        return empty
    best = min(uniform, key=lambda other: uniform[other].mean())
    difference, low, high, p = estimate([measured - uniform[best]])
    return {
        "uniform": recipe_label(best.axes, config["formats"]),
        "uniform_bits": study[best]["error"]["summary"]["stored_bits"],
        "uniform_measured": float(uniform[best].mean()),
        "difference": f"{significant(difference)} ({significant(low)} to {significant(high)})",
        "verdict": confirmed(difference, low, high, p),
    }


def shades(uniform: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Scheme -> place of its bits between the smallest (10) and the largest (70) scheme, in percent."""
    bits = {name: entry["bits"] for name, entry in uniform.items()}
    low, high = min(bits.values()), max(bits.values())
    return {name: round(10 + 60 * (value - low) / (high - low or 1)) for name, value in bits.items()}


def layers_of(shape: ModelShape, schemes: Mapping[str, str]) -> dict[str, Any]:
    """``groups``: kinds of linears, those with one scheme in all layers joined; ``layers``: the name of the
    scheme of each group in each layer, several names joined (experts apart)."""
    named = {linear.split(".")[1] for linear in schemes}
    kinds = [kind for kind in LINEARS if kind in named]
    names = {
        (layer, kind): ", ".join(
            dict.fromkeys(name for linear, name in schemes.items() if linear.split(".")[:2] == [str(layer), kind])
        )
        for layer in range(shape.layers)
        for kind in kinds
    }
    joined: list[list[str]] = []
    for kind in kinds:
        column = [names[layer, kind] for layer in range(shape.layers)]
        if joined and column == [names[layer, joined[-1][0]] for layer in range(shape.layers)]:
            joined[-1].append(kind)
        else:
            joined.append([kind])
    layers = [[names[layer, group[0]] for group in joined] for layer in range(shape.layers)]
    return {"groups": [", ".join(group) for group in joined], "layers": layers}
