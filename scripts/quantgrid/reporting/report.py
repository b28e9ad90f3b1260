"""The report: one self-contained HTML page of all studies, offline, from the template ``workflow/report/report.html.j2``.

Figures are embedded as images (data URIs: an SVG there can run no script and its ids cannot collide), everything else that comes from data
is escaped by the template. A policy in the page forbids every network access. Times come from the benchmark records alone.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import ConfigError
from . import comparisons, costs, figures, findings, starts, table_writers, tables
from .records import AXES, is_baseline, tidy
from .style import metric, metric_label, significant, value_label

TEMPLATE = Path(__file__).resolve().parents[3] / "workflow" / "report" / "report.html.j2"
MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".csv": "text/csv"}
CONTEXT = {
    "title": "quantgrid",
    "description": "",
    "models": [],
    "corpora": [],
    "training": [],
    "protocol": {},
    "versions": {},
    "hashes": {},
    "benchmarks": [],
    "missing": [],
    "losses": "",
    "distributions": [],
    "claims": [],
    "overview": [],
    "config": "",
}
DISTRIBUTIONS = ("Once each transform is folded in, before anything is rounded. Inputs are the tokens that calibration kept, always with those of "
                 "largest norm, as the transform and its online operations leave them: estimates of what all tokens do. Weights are those of "
                 "all linears that read the input.")
LOSSES = ("Loss of every training step on the batch of that step. Where layers are trained one by one, a thin line is a layer and the thick one "
          "their mean, on a log axis. Batches differ from step to step.")
STARTS = (f"Every training is compared with its start, part by part: all parameters at once, or decoder layer by decoder layer. A part that ended no "
          f"lower keeps its start. Where all parts of a training do, {starts.WORDS!r}, the cell is what its transform or mitigation starts from: it "
          f"is marked {starts.MARK} in tables and hollow in figures, and findings leave comparisons with it undecided.")
WITHOUT_REFERENCE = ("perplexity", "negative_log_likelihood", "accuracy", "mean_accuracy")  # what a baseline cell has; the others compare with it


@dataclass(frozen=True)
class StudySection:
    """One study of the report: its spec, its tidy records, its figure (.svg or .png, None if it could not be drawn) and its files.

    ``links`` maps what a file is (``table, CSV``) to its path relative to the report; ``compared`` holds its comparisons, if it has any;
    ``published`` are lines of ``published.beside``.
    """

    spec: Mapping[str, Any]
    records: pd.DataFrame
    figure: str | Path | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    compared: pd.DataFrame | None = None
    published: Sequence[Mapping[str, Any]] = ()


def build(studies: Sequence[StudySection], context: Mapping[str, Any], template: str | Path = TEMPLATE) -> str:
    """The page as text. ``context`` holds any of ``CONTEXT``'s keys (anything else is a :class:`ConfigError`):

    title, description; models and corpora (lists of flat dicts; ``name`` and, of a model, ``provenance`` are shown first), training (dicts of
    mitigation, method, trained, steps), protocol, versions and hashes (flat dicts), benchmarks (records of
    ``costs.read``), missing (dicts of cell, the axes, reason), losses (path of the figure of losses, .svg or .png), distributions (dicts of
    model, name, caption, path and links of a figure), claims (those of ``findings.read``), overview (figures of ``page.overview``), config (a dict
    or its text).
    """
    unknown = sorted(set(context) - set(CONTEXT))
    if unknown:
        raise ConfigError(f"report context: unknown {', '.join(unknown)}. Accepted: {', '.join(CONTEXT)}")
    full = {**CONTEXT, **context}
    if not isinstance(full["config"], str):
        full["config"] = json.dumps(full["config"], indent=2, ensure_ascii=False, default=str)
    full["overview"] = [{**figure, "image": data_uri(figure["image"]), "data": data_beside(figure["image"])} for figure in full["overview"]]
    template = Path(template)
    strict = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(template.parent), **strict)
    environment.filters |= {"duration": duration, "mebibytes": mebibytes, "path": lambda path: quote(str(path), safe="/.")}
    sections = [section(study, number) for number, study in enumerate(studies, 1)]
    return environment.get_template(template.name).render(
        **full,
        studies=sections,
        loss_image=data_uri(full["losses"]) if full["losses"] else "",
        loss_caption=LOSSES,
        distribution_figures=[{**figure, "image": data_uri(figure["path"])} for figure in full["distributions"]],
        distribution_note=DISTRIBUTIONS,
        claim_models=findings.models(full["claims"]),
        verdicts=findings.counts(full["claims"]),
        counts=counts(studies),
        problems=problems(studies, full["missing"]),
        starts=starts.lines([(study.spec.get("study", ""), study.records) for study in studies]),
        starts_note=STARTS,
        start_mark=starts.LEGEND,
        rules=costs.summary(full["benchmarks"]),
        axes=list(AXES),
        model_columns=keys_of(full["models"], ("name", "provenance")),
        corpus_columns=keys_of(full["corpora"], ("name",)),
    )


def section(study: StudySection, number: int) -> dict[str, Any]:
    """What the template shows of one study; a table or figure that its spec does not allow becomes a message in its place."""
    result = {"id": f"study-{number}", "spec": study.spec, "links": study.links, "image": "", "data": "", "numbers": "", "table": None,
              "comparison": None, "caption": "", "error": "", "published": [published_line(line) for line in study.published]}
    result["title"] = study.spec.get("title") or study.spec.get("study", "")
    try:
        table = tables.build(study.records, study.spec)
        result |= {"table": table_content(table), "numbers": address("text/csv", table_writers.numbers(table).to_csv(index=False).encode())}
        if study.compared is not None:
            result["comparison"] = table_content(comparisons.table(study.compared, study.spec))
        result["caption"] = figures.caption(study.records, study.spec) if study.spec.get("figure") else ""
        result |= {"image": data_uri(study.figure), "data": data_beside(study.figure)} if study.figure else {}
    except ConfigError as error:
        result["error"] = str(error)
    return result


def table_content(table: tables.Table) -> dict[str, Any]:
    """Header lines, rows of (text, sort value, mark) and footnotes; the sort value is empty for failed and missing entries."""
    rows = []
    for position, (labels, texts, marks) in enumerate(zip(table.row_labels(), table.display.values, table.marks.values)):
        values = ["" if math.isnan(value) else repr(float(value)) for value in table.values.iloc[position]]
        rows.append({"baseline": table.baseline[position], "labels": labels, "cells": list(zip(texts, values, marks))})
    columns = table.column_labels()
    return {"axes": table.rows, "groups": table.groups(), "columns": columns if any(columns) else [], "rows": rows, "footnotes": table.footnotes,
            "note": table.note}


def published_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """One published number and its measured one as (text, sort value) pairs, labels of the recipe first."""

    def number(value: float | None, text: str = "{}") -> tuple[str, str]:
        known = value is not None and not math.isnan(value)
        return (text.format(significant(value, 4)), repr(float(value))) if known else ("–", "")

    perplexity = line["metric"] == "perplexity"
    gap = "–" if line["gap"] is None else f"{line['gap']:+.1%}" if perplexity else f"{line['gap']:+.1f} points"
    times = "{} ×" if perplexity else "{} points"
    measured, value = number(line["measured"])
    cells = [number(line["published"]), number(line["published_relative"], times), (starts.marked(measured, line["start_kept"]), value),
             number(line["measured_relative"], times), (gap, "" if line["gap"] is None else repr(float(line["gap"])))]
    labels = [value_label(axis, line[axis]) for axis in AXES[1:]]
    return {"labels": labels, "metric": metric_label(line["metric"]), "models": (line["published_model"], line["measured_model"]),
            "table": f"{line['table']} ({line['confidence']})", "cells": cells, "start_kept": line["start_kept"]}


def data_uri(path: str | Path) -> str:
    """A picture, or a table, as a ``data:`` address; :class:`ConfigError` if the file is absent, or neither SVG, PNG nor CSV."""
    path = Path(path)
    if path.suffix not in MEDIA or not path.is_file():
        raise ConfigError(f"{path}: the report shows existing .svg and .png files, with the .csv of their data")
    return address(MEDIA[path.suffix], path.read_bytes())


def address(kind: str, content: bytes) -> str:
    """``content`` as a ``data:`` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def data_beside(figure: str | Path) -> str:
    """The numbers of a figure as a ``data:`` address, empty where there is no .csv beside it."""
    path = Path(figure).with_suffix(".csv")
    return data_uri(path) if path.is_file() else ""


def counts(studies: Sequence[StudySection]) -> dict[str, int]:
    """Numbers of studies and of distinct cells, ok and failed, over all studies."""
    frames = [tidy(study.records)[["cell", "status"]] for study in studies]
    status = pd.concat(frames).groupby("cell").status.agg(lambda values: (values == "ok").all()) if frames else pd.Series(dtype=bool)
    return {"studies": len(studies), "cells": len(status), "failed": int((~status.astype(bool)).sum())}


def problems(studies: Sequence[StudySection], missing: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per failed cell, per cell without a metric that its study's table wants, and per entry of ``missing``; studies are joined."""
    found: dict[tuple, dict[str, Any]] = {}
    for study in studies:
        records = tidy(study.records)
        for state, part in (("failed", records[records.status != "ok"]), ("missing", lacking(records, study.spec))):
            for cell in part.itertuples():
                line = found.setdefault((cell.cell, state, cell.reason), {"state": state, "reason": cell.reason, "studies": []})
                line |= {"cell": cell.cell, **{axis: value_label(axis, getattr(cell, axis)) for axis in AXES}}
                line["studies"] = [*dict.fromkeys([*line["studies"], study.spec.get("study", "")])]
    absent = [{"state": "missing", "studies": [], "cell": "", "reason": "not computed", **dict.fromkeys(AXES, ""), **entry} for entry in missing]
    return [*found.values(), *absent]


def lacking(records: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Cells that are ok but have no value of a metric in the spec's table, with the metrics as their reason."""
    wanted = (spec.get("table") or {}).get("metrics", [])
    cells = records[records.status == "ok"].drop_duplicates("cell").copy()
    measured = records[records.value.notna()].groupby("cell").metric.agg(set).to_dict()
    reasons = []
    for cell, baseline in zip(cells.cell, is_baseline(cells)):
        names = [name for name in wanted if name not in measured.get(cell, set()) and (not baseline or name in WITHOUT_REFERENCE)]
        reasons.append(f"no {', '.join(metric(name).label for name in names)}" if names else "")
    cells["reason"] = reasons
    return cells[cells.reason != ""]


def keys_of(entries: Sequence[Mapping[str, Any]], first: Sequence[str]) -> list[str]:
    """Columns for a list of flat dicts: those of ``first`` that occur, then the others in order of appearance."""
    every = list(dict.fromkeys(key for entry in entries for key in entry))
    return [*(key for key in first if key in every), *(key for key in every if key not in first)]


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``; a dash where it is unknown."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mebibytes(size: float) -> str:
    return "–" if math.isnan(size) else f"{size:.0f}"
