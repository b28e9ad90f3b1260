"""Recommendations for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..data.starts import MEANING, WORDS
from ..style import significant, with_error
from .recommendation import cheapest
from .served import LEGEND

HEAD = (
    "",
    "recipe",
    "bits",
    "of these online",
    "online operations",
    "divergence, nats/token",
    "perplexity",
    "above the best, 95 % interval",
)


def text(found: pd.DataFrame, title: str, top: int, served: Mapping[str, str] | None = None) -> str:
    """Format the first ``top`` lines of a recommendation, columns aligned.

    An asterisk marks the best and the cells not significantly different from it; the last line names
    the cheapest of these. ``served`` maps cells to the programs that compute them exactly.
    """
    lines = [(*HEAD, *["served exactly"] * (served is not None))]
    lines += [
        (*columns(row), *([served.get(row["cell"]) or "–"] if served is not None else []))
        for row in found.head(top).to_dict("records")
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    note = f"* the best, or not distinguishable from it (paired by window, Holm over {len(found) - 1} comparisons)"
    starts = [f"{WORDS}: {MEANING}"] if found.head(top).start_kept.any() else []
    replaced = [
        f"{row.recipe} is in the place of {row.replaces}: the paired test of divergences does not tell them apart."
        for row in found.head(top).itertuples()
        if row.replaces
    ]
    legend = [LEGEND] * (served is not None)
    return "\n".join([title, body, note, *legend, *replaced, *starts, conclusion(found)])


def columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Format the columns of one recipe."""
    interval = f"{significant(row['difference'])} ({significant(row['low'])} to {significant(row['high'])})"
    return (
        f"{row['rank']}{'*' if row['indistinguishable'] else ''}",
        row["recipe"] + (f" ({WORDS})" if row["start_kept"] else ""),
        f"{row['bits']:.3f}",
        f"{row['added_bits']:.3f}",
        significant(row["operations"], 4),
        with_error(row["divergence"], row["stderr"]),
        f"{significant(row['perplexity'])} ({row['relative']:.3f} ×)",
        "–" if row["rank"] == 1 else interval,
    )


def conclusion(found: pd.DataFrame) -> str:
    """Name the cheapest of the recipes not significantly different from the best."""
    tied, row = int(found.indistinguishable.sum()), cheapest(found)
    if tied == 1:
        return f"{row.recipe} is better than all others."
    return (
        f"Of the {tied} with an asterisk the cheapest to run is {row['rank']}, {row.recipe}: "
        f"{significant(row.operations, 4)} online operations per token, {row.bits:.3f} bits."
    )
