"""Answer of a run, for the first screen of the report: recommended recipes, the reasons, a figure of
divergence against bits for every model and kind of deployment, and all cells with their cards."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...config.deployments import ROUNDED
from ...plan.pipeline import Plan
from ..claims.headlines import first_budget, headlines
from ..claims.reasons import reasons
from ..figures import pareto
from ..figures.study_figures import save
from .cell_cards import cards, cell_lines
from .study_sections import data_uri


def answer(
    records: pd.DataFrame, items: pd.DataFrame, config: Mapping[str, Any], plan: Plan, base: Path
) -> dict[str, Any]:
    """Build the context of the first screen: ``recommended`` (:func:`headlines.headlines`), the ``budget``
    that is shown first, ``reasons`` of the recipes within it, ``fronts`` (a figure for each model,
    corpus and kind of rounded tensors), ``cells`` and their ``cards``.

    ``records`` are those of results.csv, ``items`` the per-window values; models come in the order of the
    config, and links go to files below ``base``.
    """
    formats, order = config["formats"], {model: at for at, model in enumerate(config["models"])}
    records = records.sort_values("model", key=lambda names: names.map(order), kind="stable")
    lines = headlines(records, items, formats)
    budget = first_budget(lines)
    shown = [line for line in lines if line["budget"] == budget]
    return {
        "recommended": lines,
        "budget": budget,
        "reasons": reasons(shown, records, items, formats),
        "fronts": fronts(pareto.points(records, formats)),
        "cells": cell_lines(records, formats),
        "cards": cards(records, config, plan, base),
    }


def fronts(marks: pd.DataFrame) -> list[dict[str, str]]:
    """Draw a panel of the Pareto figure for each model, corpus and kind of rounded tensors: ``model``,
    ``title`` and the image as a ``data:`` address."""
    found = []
    drawn = pareto.quantized(marks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front.svg"
        for (model, dataset), own in drawn.groupby(["model", "dataset"], sort=False):
            for rounded in (name for name in ROUNDED if name in set(own.rounded)):
                save(pareto.plot(own, only=rounded), [path])
                title = f"{model}, {ROUNDED[rounded]}, {dataset}"
                found.append({"model": str(model), "title": title, "image": data_uri(path)})
    return found
