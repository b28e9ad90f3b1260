"""Sections of the report, one per study: data of the template from records, tables, figures and
published numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ...ground.errors import ConfigError
from ..data import starts
from ..data.records import AXES
from ..figures import study_figures
from ..style import metric_label, significant, value_label
from ..tables import comparisons, parts, study_tables, writers

MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".csv": "text/csv"}


@dataclass(frozen=True)
class StudySection:
    """One study of the report: its spec, its tidy records, its figure (.svg or .png, None if it
    could not be drawn) and its files.

    ``links`` maps a kind of file (``table, CSV``) to its path relative to the report; ``compared``
    holds its comparisons, if any; ``published`` are lines of ``published.with_measured``, ``races``
    those of ``race_sections.race_section``.
    """

    spec: Mapping[str, Any]
    records: pd.DataFrame
    figure: str | Path | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    compared: pd.DataFrame | None = None
    published: Sequence[Mapping[str, Any]] = ()
    races: Sequence[Mapping[str, Any]] = ()


def section(study: StudySection, number: int) -> dict[str, Any]:
    """Build the template data of one study; an invalid table or figure becomes a message in its
    place."""
    result = {
        "id": f"study-{number}",
        "spec": study.spec,
        "links": study.links,
        "image": "",
        "data": "",
        "numbers": "",
        "tables": [],
        "comparisons": [],
        "caption": "",
        "error": "",
        "published": [published_line(line) for line in study.published],
        "unseen": unseen(study.records),
        "races": list(study.races),
    }
    result["title"] = study.spec.get("title") or study.spec.get("study", "")
    try:
        table = study_tables.build(study.records, study.spec)
        result |= {
            "tables": [table_content(part) for part in parts.parts(table)],
            "numbers": address("text/csv", writers.numbers(table).to_csv(index=False).encode()),
        }
        if study.compared is not None:
            compared = comparisons.table(study.compared, study.spec)
            result["comparisons"] = [table_content(part) for part in parts.parts(compared)]
        result["caption"] = study_figures.caption(study.records, study.spec) if study.spec.get("figure") else ""
        result |= {"image": data_uri(study.figure), "data": data_beside(study.figure)} if study.figure else {}
    except ConfigError as error:
        result["error"] = str(error)
    return result


def unseen(records: pd.DataFrame) -> str:
    """Note on models with an expert that saw no calibration token; empty without one."""
    found = records[(records.metric == "expert_tokens_smallest") & (records.value == 0)]
    models = ", ".join(found.model.unique())
    return models and f"At least one expert of {models} saw no calibration token; it is rounded without statistics."


def table_content(table: study_tables.Table) -> dict[str, Any]:
    """Build header lines, rows of (text, sort value, mark) and footnotes; the sort value is empty
    for failed and missing entries."""
    rows = []
    for position, (labels, texts, marks) in enumerate(
        zip(table.row_labels(), table.display.values, table.marks.values)
    ):
        values = ["" if math.isnan(value) else repr(float(value)) for value in table.values.iloc[position]]
        rows.append({"baseline": table.baseline[position], "labels": labels, "cells": list(zip(texts, values, marks))})
    columns = table.column_labels()
    return {
        "axes": table.rows,
        "groups": table.groups(),
        "columns": columns if any(columns) else [],
        "rows": rows,
        "footnotes": table.footnotes,
        "note": table.note,
    }


def published_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """Format one published number and its measured one as (text, sort value) pairs, labels of the
    recipe first."""

    def number(value: float | None, text: str = "{}") -> tuple[str, str]:
        known = value is not None and not math.isnan(value)
        return (text.format(significant(value, 4)), repr(float(value))) if known else ("–", "")

    perplexity = line["metric"] == "perplexity"
    gap = "–" if line["gap"] is None else f"{line['gap']:+.1%}" if perplexity else f"{line['gap']:+.1f} points"
    times = "{} ×" if perplexity else "{} points"
    measured, value = number(line["measured"])
    cells = [
        number(line["published"]),
        number(line["published_relative"], times),
        (starts.marked(measured, line["start_kept"]), value),
        number(line["measured_relative"], times),
        (gap, "" if line["gap"] is None else repr(float(line["gap"]))),
    ]
    labels = [value_label(axis, line[axis]) for axis in AXES[1:]]
    return {
        "labels": labels,
        "metric": metric_label(line["metric"]),
        "models": (line["published_model"], line["measured_model"]),
        "table": f"{line['table']} ({line['confidence']})",
        "cells": cells,
        "start_kept": line["start_kept"],
    }


def data_uri(path: str | Path) -> str:
    """Encode a picture, or a table, as a ``data:`` address; :class:`ConfigError` if the file is
    missing, or neither SVG, PNG nor CSV."""
    path = Path(path)
    if path.suffix not in MEDIA or not path.is_file():
        raise ConfigError(f"{path}: the report shows existing .svg and .png files, with the .csv of their data")
    return address(MEDIA[path.suffix], path.read_bytes())


def address(kind: str, content: bytes) -> str:
    """Encode ``content`` as a ``data:`` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def data_beside(figure: str | Path) -> str:
    """Encode the numbers of a figure as a ``data:`` address; empty without a .csv next to it."""
    path = Path(figure).with_suffix(".csv")
    return data_uri(path) if path.is_file() else ""
