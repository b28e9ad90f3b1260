"""Report: one self-contained HTML page of all studies, offline, from the template
``workflow/report/report.html.j2``.

Figures are embedded as images (data URIs: an SVG in one can run no script and its ids cannot
collide); the template escapes all other data. A policy in the page forbids all network access.
Times come from the benchmark records alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...ground.errors import ConfigError
from ...ground.places import ROOT
from ..claims import findings
from ..claims.served import MEANING
from ..data import costs, starts
from ..data.records import AXES, is_baseline, tidy
from ..style import metric, significant, value_label
from .cell_cards import values
from .study_sections import StudySection, data_beside, data_uri, section

TEMPLATE = ROOT / "workflow" / "report" / "report.html.j2"
CONTEXT = {
    "title": "quantgrid",
    "description": "",
    "models": [],
    "corpora": [],
    "training": [],
    "served": [],
    "allocated": [],
    "protocol": {},
    "versions": {},
    "hashes": {},
    "benchmarks": [],
    "missing": [],
    "losses": "",
    "distributions": [],
    "claims": [],
    "overview": [],
    "recommended": [],
    "budget": "",
    "reasons": [],
    "fronts": [],
    "cells": [],
    "cards": {},
    "config": "",
}
DISTRIBUTIONS = (
    "Once each transform is folded in, before anything is rounded. Inputs are the tokens that calibration "
    "kept, always with those of "
    "largest norm, as the transform and its online operations leave them: estimates of what all tokens "
    "do. Weights are those of "
    "all linears that read the input."
)
LOSSES = (
    "Loss of every training step on the batch of that step. Where layers are trained one by one, a thin line is a "
    "layer and the thick one "
    "their mean, on a log axis. Batches differ from step to step."
)
ALLOCATIONS = (
    "One scheme for every group of linears, chosen for the smallest predicted divergence within the limit. The "
    "prediction adds up the output errors of the linears, weighted by their sensitivities. Each allocation stands next "
    "to the uniform scheme of smallest measured divergence within the limit, on the same windows; where the paired "
    "test does not tell them apart, the uniform scheme is the better choice."
)
STARTS = (
    "Every training is compared with its start, part by part: all parameters at once, or decoder layer by decoder "
    "layer. A part that ended no "
    f"lower keeps its start. Where all parts of a training do, {starts.WORDS!r}, the cell is what its transform or "
    "mitigation starts from: it "
    f"is marked {starts.MARK} in tables and hollow in figures, and findings leave comparisons with it undecided."
)
WITHOUT_REFERENCE = (
    "perplexity",
    "negative_log_likelihood",
    "accuracy",
    "mean_accuracy",
)  # metrics of a baseline cell; the others are relative to it


def build(studies: Sequence[StudySection], context: Mapping[str, Any], template: str | Path = TEMPLATE) -> str:
    """Build the page as text. ``context`` holds any of ``CONTEXT``'s keys (any other key is a
    :class:`ConfigError`):

    title, description; models and corpora (lists of flat dicts; ``name`` and, of a model,
    ``provenance`` are shown first), training (dicts of mitigation, method, trained, steps), served
    (dicts of the axes, recipe, served: ``claims.served.recipes``), allocated (``data.allocations.lines``),
    protocol, versions and hashes (flat dicts), benchmarks (records of ``costs.read``), missing
    (dicts of cell, the axes, reason), losses (path of the figure of losses, .svg or .png),
    distributions (dicts of model, name, caption, path and links of a figure), claims (those of
    ``findings.read``), overview (figures of ``page_context.overview``), recommended, budget, reasons,
    fronts, cells and cards (those of ``answer.answer``), config (a dict or its text).
    """
    unknown = sorted(set(context) - set(CONTEXT))
    if unknown:
        raise ConfigError(f"report context: unknown {', '.join(unknown)}. Accepted: {', '.join(CONTEXT)}")
    full = {**CONTEXT, **context}
    if not isinstance(full["config"], str):
        full["config"] = json.dumps(full["config"], indent=2, ensure_ascii=False, default=str)
    full["overview"] = [
        {**figure, "image": data_uri(figure["image"]), "data": data_beside(figure["image"])}
        for figure in full["overview"]
    ]
    template = Path(template)
    strict = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(template.parent), **strict)
    environment.filters |= {
        "duration": duration,
        "mebibytes": mebibytes,
        "path": lambda path: quote(str(path), safe="/."),
        "significant": significant,
    }
    judged = full["claims"] = findings.judged(full["claims"])
    sections = [section(study, number) for number, study in enumerate(studies, 1)]
    return environment.get_template(template.name).render(
        **full,
        studies=sections,
        loss_image=data_uri(full["losses"]) if full["losses"] else "",
        loss_caption=LOSSES,
        served_note=MEANING,
        allocated_note=ALLOCATIONS,
        distribution_figures=[{**figure, "image": data_uri(figure["path"])} for figure in full["distributions"]],
        distribution_note=DISTRIBUTIONS,
        claim_models=findings.models(judged),
        verdicts=findings.counts(judged),
        budgets=sorted({line["budget"] for line in full["recommended"]}, key=float),
        filters=values(full["cells"]),
        cards_json=Markup(json.dumps(full["cards"], ensure_ascii=False).replace("<", "\\u003c")),
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


def counts(studies: Sequence[StudySection]) -> dict[str, int]:
    """Count studies and distinct cells, ok and failed, over all studies."""
    frames = [tidy(study.records)[["cell", "status"]] for study in studies]
    status = (
        pd.concat(frames).groupby("cell").status.agg(lambda values: (values == "ok").all())
        if frames
        else pd.Series(dtype=bool)
    )
    return {"studies": len(studies), "cells": len(status), "failed": int((~status.astype(bool)).sum())}


def problems(studies: Sequence[StudySection], missing: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List one line per failed cell, per cell without a metric of its study's table, and per entry
    of ``missing``; studies are joined."""
    found: dict[tuple, dict[str, Any]] = {}
    for study in studies:
        records = tidy(study.records)
        for state, part in (("failed", records[records.status != "ok"]), ("missing", lacking(records, study.spec))):
            for cell in part.itertuples():
                line = found.setdefault(
                    (cell.cell, state, cell.reason), {"state": state, "reason": cell.reason, "studies": []}
                )
                line |= {"cell": cell.cell, **{axis: value_label(axis, getattr(cell, axis)) for axis in AXES}}
                line["studies"] = [*dict.fromkeys([*line["studies"], study.spec.get("study", "")])]
    absent = [
        {"state": "missing", "studies": [], "cell": "", "reason": "not computed", **dict.fromkeys(AXES, ""), **entry}
        for entry in missing
    ]
    return [*found.values(), *absent]


def lacking(records: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """List cells that are ok but lack a value of a metric in the spec's table, with the metrics as
    their reason."""
    wanted = (spec.get("table") or {}).get("metrics", [])
    cells = records[records.status == "ok"].drop_duplicates("cell").copy()
    measured = records[records.value.notna()].groupby("cell").metric.agg(set).to_dict()
    reasons = []
    for cell, baseline in zip(cells.cell, is_baseline(cells)):
        names = [
            name
            for name in wanted
            if name not in measured.get(cell, set()) and (not baseline or name in WITHOUT_REFERENCE)
        ]
        reasons.append(f"no {', '.join(metric(name).label for name in names)}" if names else "")
    cells["reason"] = reasons
    return cells[cells.reason != ""]


def keys_of(entries: Sequence[Mapping[str, Any]], first: Sequence[str]) -> list[str]:
    """List the columns for flat dicts: those of ``first`` that occur, then the others in order of
    appearance."""
    every = list(dict.fromkeys(key for entry in entries for key in entry))
    return [*(key for key in first if key in every), *(key for key in every if key not in first)]


def duration(seconds: float) -> str:
    """Format a duration: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``; a dash if unknown."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mebibytes(size: float) -> str:
    return "–" if math.isnan(size) else f"{size:.0f}"
