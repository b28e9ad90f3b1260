"""Races in the report: the sentence, the figure, the table and the reasons of each race of a study."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...plan.race_steps import Race
from ..claims.reasons import Measured, sentence
from ..data import races
from ..data.evaluation_rows import cell_key
from ..figures import races as race_figures
from ..figures.study_figures import save
from ..style import recipe_label, significant, with_error
from .study_sections import address, data_uri

COLUMNS = ("recipe", "bits", "online operations", "windows", "mean", "above the best", "p", "look", "result")


def race_section(race: Race, decision: Mapping[str, Any], formats: Mapping[str, Any]) -> dict[str, Any]:
    """Build the template data of a race: a sentence, the cheapest recipe, a figure, a row per candidate, and
    the ``reasons`` of its best and its cheapest recipe. ``formats`` are the entries of the config."""
    table = races.table(race, decision)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "race.svg")
        save(race_figures.plot(race, decision), [picture])
        image = data_uri(picture)
    first = races.cheapest_first(race, decision).head(1)
    cheapest = [f"The cheapest to run of these is {recipe_label(row, formats)}." for row in first.to_dict("records")]
    labels = {cell.path: recipe_label(cell.axes, formats) for cell in race.candidates}
    return {
        "summary": " ".join([races.summary(race, decision), *cheapest]),
        "image": image,
        "caption": race_figures.caption(race),
        "columns": COLUMNS,
        "rows": [_row(row, labels) for row in table.to_dict("records")],
        "reasons": race_reasons(race, decision, formats, [*decision["survivors"][:1], *first.cell]),
        "data": address("text/csv", table.to_csv(index=False).encode()),
    }


def race_reasons(
    race: Race, decision: Mapping[str, Any], formats: Mapping[str, Any], chosen: Sequence[str]
) -> list[dict[str, str]]:
    """Build a sentence for each ``chosen`` candidate (``Cell.path``) as :func:`reasons.reasons` does, from the
    divergences of the race; empty for a race by another metric."""
    if race.settings["metric"] != "kl_divergence":
        return []
    evaluated = decision["losses"].keys() - decision["failed"]
    known = {cell.path: cell for cell in race.candidates if cell.path in evaluated}
    cells = pd.DataFrame([cell.axes for cell in known.values()], index=list(known))
    values = {path: np.asarray(decision["losses"][path]) for path in known}
    measured = Measured(cells, values, formats, " on the windows of the race that both have")
    found = {path: sentence(path, measured) for path in dict.fromkeys(chosen) if path in known}
    return [{"model": race.model, "cell": cell_key(known[path]), "text": text} for path, text in found.items() if text]


def _row(row: Mapping[str, Any], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Texts and sort values of the columns of one candidate; ``labels`` name all candidates."""

    def number(value: float | None, text: str | None = None) -> tuple[str, str]:
        known = value is not None and value == value
        return (text or significant(value), repr(float(value))) if known else ("–", "")

    measured = row["windows"] > 0
    reason = " ".join(labels.get(word, word) for word in row["reason"].split(" "))
    return [
        (labels[row["cell"]], ""),
        number(row["bits"], f"{row['bits']:.3f}" if row["bits"] == row["bits"] and row["bits"] else None),
        number(row["operations"]),
        number(row["windows"], str(row["windows"])),
        number(row["loss"], with_error(row["loss"], row["stderr"]) if measured else None),
        number(row["difference"], with_error(row["difference"], row["difference_stderr"]) if measured else None),
        number(row["p"]),
        number(row["look"], f"{row['look']:.0f}" if row["look"] == row["look"] and row["look"] else None),
        (reason, ""),
    ]
