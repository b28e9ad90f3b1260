"""Races of a study: decisions read, and what they say about each candidate.

Windows of a race are a protocol of their own: candidates have different numbers of them, and none
of them is a window of the study's evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...config.cells import Cell
from ...evaluation.protocols import of_perplexity
from ...evaluation.races import ALL_WINDOWS, CLOSE
from ...evaluation.significance import mean_and_error, paired_difference
from ...ground.documents import parse_json
from ...ground.errors import ConfigError
from ...jobs.integrity import read_verified
from ...plan.pipeline import Plan
from ...plan.race_steps import Race
from .records import RACE

STAYED = "not told apart from the best"


def read(path: str) -> dict[str, Any]:
    """Read and verify the decision that ends a race."""
    return parse_json(read_verified(path), path)


def last(plan: Plan, race: Race) -> dict[str, Any]:
    """Read the decision that ended a race; :class:`ConfigError` if it has not ended."""
    for step in plan.decisions(race):
        if Path(step.outputs["decision"]).is_file() and (found := read(step.outputs["decision"]))["ended"]:
            return found
    raise ConfigError(f"the race of study '{race.study}' on '{race.model}' has not ended; run the workflow")


def contents(race: Race, decision: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Map each candidate that was evaluated to its result in the race, in the form of an evaluation."""
    found: dict[Cell, dict[str, Any]] = {}
    for cell in race.candidates:
        if cell.path in decision["failed"]:
            found[cell] = {"status": "failed", "reason": decision["failed"][cell.path]}
        elif losses := decision["losses"].get(cell.path):
            value, error = mean_and_error(losses)
            found[cell] = {
                "status": "ok",
                "metric": RACE + race.settings["metric"],
                "value": value,
                "stderr": error,
                "count": len(losses),
                "protocol": protocol(race, decision),
            }
    return found


def protocol(race: Race, decision: Mapping[str, Any]) -> dict[str, Any]:
    """Protocol of a race: that of its windows, with the looks."""
    about, looks = decision["corpus"], [*race.conditions["looks"]]
    found = of_perplexity({**about["corpus"], "windows": looks[-1]}, about["dtype"])
    return {**found, "name": f"race, {found['name']}", "looks": looks}


def table(race: Race, decision: Mapping[str, Any]) -> pd.DataFrame:
    """Build a row per candidate, survivors first and then in the reverse order of leaving: cell, axes,
    bits, online operations, windows, mean loss, its error, difference to the best on the same windows
    with its error, p-value of the look at which it left, number of that look (empty if it stayed, 0
    if it was not raced) and the reason."""
    left = {
        name: (number, reason)
        for number, leaving in enumerate([decision["pruned"], *(look["left"] for look in decision["looks"])])
        for name, reason in leaving.items()
    }
    rows = []
    best = decision["losses"].get(decision["survivors"][0]) if decision["survivors"] else None
    for cell in race.candidates:
        number, reason = left.get(cell.path, (None, STAYED if cell.path in decision["survivors"] else ""))
        losses, bits = decision["losses"].get(cell.path, []), decision["bits"].get(cell.path, {})
        mean, error = mean_and_error(losses) if losses else (None, None)
        difference = paired_difference(losses, best[: len(losses)]) if losses and best else (None, None)
        standing = decision["looks"][(number or len(decision["looks"])) - 1]["standings"].get(cell.path, {})
        rows.append(
            {
                "cell": cell.path,
                **cell.axes,
                "bits": bits.get("stored_bits"),
                "operations": bits.get("online_operations"),
                "windows": len(losses),
                "loss": mean,
                "stderr": error,
                "difference": difference[0],
                "difference_stderr": difference[1],
                "p": standing.get("p") if number else None,
                "look": number,
                "reason": reason,
            }
        )
    frame = pd.DataFrame(rows)
    order = frame.look.fillna(len(decision["looks"]) + 1)
    return frame.assign(order=-order).sort_values(["order", "loss"], kind="stable").drop(columns="order")


def summary(race: Race, decision: Mapping[str, Any]) -> str:
    """Say in one sentence what a race found: the recipes not told apart, and what it saved."""
    kept, count = len(decision["survivors"]), len(race.candidates) - len(decision["pruned"])
    if not kept:
        return f"All {count} recipes of {race.model} failed.{_pruned(len(decision['pruned']))}"
    used = sum(map(len, decision["losses"].values())) / (len(race.candidates) * race.conditions["looks"][-1])
    sure = f"best kept with probability >= {1 - race.settings['alpha']:g} under the test's assumptions"
    told = f"{kept} of {count} recipes of {race.model} are not told apart, {sure}"
    if kept == 1:
        told = f"One of {count} recipes of {race.model} is better than all others, {sure}"
    ends = {
        CLOSE: f"; the others of these are within {race.settings['close']:.0%} of the best",
        ALL_WINDOWS: "; all windows are used",
    }
    saved = f"{1 - used:.0%} of the window evaluations were saved"
    return f"{told}{ends.get(decision['ended'], '')}; {saved}.{_pruned(len(decision['pruned']))}"


def _pruned(count: int) -> str:
    """Say how many recipes a race left out by prediction; empty for none."""
    told = f" Left out by the predicted error of their transform and format: {count}"
    return f"{told}; there is no guarantee that the best is not one of them." if count else ""


def cheapest_first(race: Race, decision: Mapping[str, Any]) -> pd.DataFrame:
    """Select the recipes that a race does not tell apart, the cheapest first: fewest online
    operations, then fewest bits, then the smallest loss."""
    found = table(race, decision)
    return found[found.cell.isin(decision["survivors"])].sort_values(["operations", "bits", "loss"], kind="stable")
