"""Course of a race: the mean loss of every candidate against the windows that it was evaluated on. A
line ends where its candidate left; survivors are bold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...evaluation.races import Conditions
from ...plan.race_steps import Race
from ..style import EMPTY, GRID, HEIGHT, INK, PALETTE, WIDTH, metric_label
from .panels import scale_ticks
from .study_figures import SETTINGS

NAMED = 5  # survivors that the legend names


def course(race: Race, decision: Mapping[str, Any]) -> pd.DataFrame:
    """Build a row per candidate and look: cell, whether it survived, windows, mean loss on them
    (nats per token)."""
    rows = []
    for cell, losses in decision["losses"].items():
        ends = [end for end in race.conditions["looks"] if end <= len(losses)]
        rows += [(cell, cell in decision["survivors"], end, math.fsum(losses[:end]) / end) for end in ends]
    return pd.DataFrame(rows, columns=["cell", "survived", "windows", "loss"]).astype({"survived": bool})


def plot(race: Race, decision: Mapping[str, Any]) -> Figure:
    """Plot the course of a race, with a band for losses close to the best."""
    table = course(race, decision)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.grid(axis="y")
        for _, part in table[~table.survived].groupby("cell", sort=False):
            axis.plot(part.windows, part.loss, color=GRID, linewidth=0.7, marker=".", markersize=3)
        kept = [table[table.cell == cell] for cell in decision["survivors"]]
        for number, part in enumerate(kept):
            label = part.cell.iloc[0].partition("/")[2] if number < NAMED else None
            axis.plot(
                part.windows, part.loss, color=PALETTE[number % len(PALETTE)], linewidth=2, marker="o", label=label
            )
        if kept:
            best = kept[0].loss.iloc[-1]
            axis.axhspan(best, best + Conditions(**race.conditions).within(best), color=EMPTY, zorder=0)
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_xscale("log", base=2)
        axis.set_xticks(race.conditions["looks"], [str(end) for end in race.conditions["looks"]])
        axis.set_yscale("log")
        if len(table):
            scale_ticks(axis, True, table.loss.min(), table.loss.max())
        axis.set_xlabel("windows")
        axis.set_ylabel(metric_label(race.settings["metric"], race.corpus), color=INK)
    return figure


def caption(race: Race) -> str:
    """Describe the figure of a race."""
    in_perplexity = "" if race.conditions["relative"] else " in perplexity"
    return (
        f"Mean of each raced recipe of {race.model} on its windows of {race.corpus}. A line "
        "ends where its recipe left; those not told apart from the best are bold, and the band holds means within "
        f"{race.settings['close']:.0%} of the best{in_perplexity}. None of these windows is "
        "one of the study's evaluations."
    )
