"""Published numbers: the file that the repository holds, which cells they belong to, and where a
gap may be named."""

from __future__ import annotations

import pandas as pd
import pytest

from checkouts import ROOT
from quantgrid.config import validation
from quantgrid.evaluation.protocols import of_perplexity
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.provenance import canonical
from quantgrid.reporting.data import published
from quantgrid.reporting.data.naming import names
from quantgrid.reporting.data.records import AXES
from quantgrid.reporting.page import report

PAPER = validation.load(ROOT / "config" / "paper.yaml")
STUDY = {
    "paper": "Tables VI and VIII",
    "study": "s",
    "table": {"rows": ["mitigation"], "columns": ["model"], "metrics": ["perplexity"]},
}


def record(
    value: float,
    model: str = "llama-3.2-1b",
    transform: str = "none",
    mitigation: str = "rtn",
    granularity: str = "channel",
    format: str = "int4",
    window: int = 2048,
    dataset: str = "wikitext2",
):
    axes = dict(zip(AXES, (model, transform, mitigation, granularity, format)))
    protocol = canonical(of_perplexity({"window": window, "corpus": dataset}, "float32"))
    return {
        "cell": "/".join(axes.values()),
        **axes,
        "status": "ok",
        "reason": "",
        "metric": "perplexity",
        "dataset": dataset,
        "value": value,
        "stderr": 0.1,
        "count": 3,
        "difference": None,
        "difference_stderr": None,
        "unit": "",
        "protocol": protocol,
    }


def full(model: str, value: float, **changes):
    return record(value, model, "none", "none", "-", "bf16", **changes)


def test_the_file_holds_sources_and_known_numbers():
    found = published.read()
    assert (
        len(found) > 700
        and set(found.confidence) == {"high", "medium"}
        and (found.source != "").all()
        and found.value.gt(0).sum() > 700
    )
    paper = found[found.source == published.PAPER]
    known = {
        ("XIII", "int4", "rtn"): 256.97,
        ("XIII", "mxfp4", "gptq"): 13.24,
        ("XV", "fp4-int4-e4m3", "gptq"): 17.96,
        ("XI", "int4_sym", "gptq"): 12.73,
    }
    for (table, form, mitigation), value in known.items():
        rows = paper[
            (paper.table == table)
            & (paper.format == form)
            & (paper.mitigation == mitigation)
            & (paper.metric == "perplexity")
        ]
        assert value in list(rows.value)
    with pytest.raises(ConfigError, match="no column source"):
        published.read(ROOT / "tests" / "data" / "golden-smoke.csv")


def test_every_recipe_of_the_paper_is_one_that_quantgrid_has():
    from quantgrid.config import registry
    from quantgrid.schemes import PRESETS

    paper = published.read().query("source == @published.PAPER")
    assert set(paper["transform"]) <= set(registry.TRANSFORMS) and set(paper.mitigation) <= set(registry.MITIGATIONS)
    assert set(paper.format) <= {*PRESETS, *PAPER["formats"]}


def test_names_of_tables():
    assert published.tables_named("Tables VI and VIII") == ["VI", "VIII"] and published.tables_named("Table XIII") == [
        "XIII"
    ]
    assert published.tables_named("") == []


def test_entries_are_known_by_method_and_preset():
    assert names(PAPER, "transform", "hadamard") == {"hadamard", "random_hadamard"}
    assert names(PAPER, "mitigation", "gptq_published") == {"gptq_published", "gptq"}
    assert names(PAPER, "format", "int4") == {"int4"} and names(PAPER, "format", "fp4-e8m0") == {"fp4-e8m0"}
    assert names(PAPER, "model", "qwen2.5-3b") == {"qwen2.5-3b"}


def test_a_gap_where_model_and_protocol_are_those_of_the_paper():
    frame = pd.DataFrame(
        [
            full("llama-3.2-1b", 9.76),
            record(22.341, transform="hadamard"),
            record(13.0, transform="hadamard", mitigation="gptq"),
        ]
    )
    lines = published.with_measured(frame, STUDY, PAPER, published.read())
    assert [(line["transform"], line["mitigation"], line["published"], line["measured"]) for line in lines] == [
        ("hadamard", "rtn", 20.31, 22.341),
        ("hadamard", "gptq", 12.95, 13.0),
    ]
    assert lines[0]["gap"] == pytest.approx(0.1) and lines[0]["published_relative"] == pytest.approx(20.31 / 9.76)
    assert (
        lines[0]["measured_relative"] == pytest.approx(22.341 / 9.76) and lines[0]["published_model"] == "Llama-3.2-1B"
    )


@pytest.mark.parametrize("changes", [{"window": 4096}, {"dataset": "c4"}])
def test_another_protocol_has_no_gap(changes):
    frame = pd.DataFrame([full("llama-3.2-1b", 9.7, **changes), record(20.0, transform="hadamard", **changes)])
    (line,) = published.with_measured(frame, STUDY, PAPER, published.read())
    assert line["gap"] is None and line["measured_relative"] == pytest.approx(20 / 9.7)


def test_another_model_has_ratios_and_no_gap():
    frame = pd.DataFrame([full("qwen2.5-3b", 8.0), record(16.0, "qwen2.5-3b", transform="hadamard")])
    (line,) = published.with_measured(frame, STUDY, PAPER, published.read())
    assert line["gap"] is None and line["measured_relative"] == 2 and line["measured_model"] == "qwen2.5-3b"
    assert published.with_measured(frame, {**STUDY, "paper": "Table XIII"}, PAPER, published.read()) == []
    assert published.with_measured(frame, {"study": "s"}, PAPER, published.read()) == []


def test_the_report_shows_both_with_the_gap():
    frame = pd.DataFrame([full("llama-3.2-1b", 9.76), record(22.341, transform="hadamard")])
    lines = published.with_measured(frame, STUDY, PAPER, published.read())
    spec = {**STUDY, "table": {"rows": ["transform"], "columns": [], "metrics": ["perplexity"]}}
    text = report.build([report.StudySection(spec, frame, published=lines)], {})
    assert (
        "Published and measured (1)" in text
        and "+10.0%" in text
        and "20.31" in text
        and "2.081 ×" in text
        and "VI (medium)" in text
    )
