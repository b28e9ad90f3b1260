"""Races in the report: the sentence, the figure and the table of each race of a study."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...plan.race_steps import Race
from ..data import races
from ..figures import races as race_figures
from ..figures.study_figures import save
from ..style import recipe_label, significant, with_error
from .study_sections import address, data_uri

COLUMNS = ("recipe", "bits", "online operations", "windows", "mean", "above the best", "p", "look", "result")


def race_section(race: Race, decision: Mapping[str, Any], formats: Mapping[str, Any]) -> dict[str, Any]:
    """Build the template data of a race: a sentence, the cheapest recipe, a figure, and a row per
    candidate. ``formats`` are the entries of the config."""
    table = races.table(race, decision)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "race.svg")
        save(race_figures.plot(race, decision), [picture])
        image = data_uri(picture)
    first = races.cheapest_first(race, decision).head(1)
    cheapest = [f"The cheapest to run of these is {recipe_label(row, formats)}." for row in first.to_dict("records")]
    return {
        "summary": " ".join([races.summary(race, decision), *cheapest]),
        "image": image,
        "caption": race_figures.caption(race),
        "columns": COLUMNS,
        "rows": [_row(row, formats) for row in table.to_dict("records")],
        "data": address("text/csv", table.to_csv(index=False).encode()),
    }


def _row(row: Mapping[str, Any], formats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Texts and sort values of the columns of one candidate."""

    def number(value: float | None, text: str | None = None) -> tuple[str, str]:
        known = value is not None and value == value
        return (text or significant(value), repr(float(value))) if known else ("–", "")

    measured = row["windows"] > 0
    return [
        (recipe_label(row, formats), ""),
        number(row["bits"], f"{row['bits']:.3f}" if row["bits"] == row["bits"] and row["bits"] else None),
        number(row["operations"]),
        number(row["windows"], str(row["windows"])),
        number(row["loss"], with_error(row["loss"], row["stderr"]) if measured else None),
        number(row["difference"], with_error(row["difference"], row["difference_stderr"]) if measured else None),
        number(row["p"]),
        number(row["look"], f"{row['look']:.0f}" if row["look"] == row["look"] and row["look"] else None),
        (row["reason"], ""),
    ]
