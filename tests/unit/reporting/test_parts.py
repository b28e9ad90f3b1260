"""Tables of at most eight columns, one metric each; figures of paired differences."""

from __future__ import annotations

import sys

import pandas as pd
import pytest

from checkouts import ROOT
from overview_cases import results
from quantgrid.reporting.figures import differences, study_figures
from quantgrid.reporting.tables import parts, study_tables, writers

sys.path.insert(0, str(ROOT / "docs"))

import wide_tables

RECORDS = results()[0].assign(best_difference=None, best_difference_stderr=None)
QUANTIZED = RECORDS[RECORDS.format.isin(["int4", "bf16"])]
TABLE = {"rows": ["transform", "granularity"], "columns": ["mitigation"], "metrics": ["perplexity", "kl_divergence"]}
FIGURE = {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "negative_log_likelihood", "scale": "log"}


def spec(**changes):
    return {"study": "s", "table": {**TABLE, **changes}, "figure": FIGURE}


def test_a_metric_per_part_and_divergence_first():
    found = parts.parts(study_tables.build(QUANTIZED, spec()))
    assert [part.groups()[0][0] for part in found] == [
        "KL divergence to full precision (nats/token), docs ↓",
        "perplexity, docs ↓",
    ]
    assert all(part.column_labels() == ["RTN", "GPTQ"] for part in found)
    text = writers.markdown(study_tables.build(QUANTIZED, spec()))
    assert text.index("KL divergence") < text.index("perplexity, docs") and "| RTN | GPTQ |" in text
    assert writers.latex(study_tables.build(QUANTIZED, spec())).count(r"\begin{tabular}") == 2


def test_metrics_without_a_column_axis_share_a_part_as_far_as_they_fit():
    metrics = ["perplexity", "kl_divergence", "stored_bits_per_weight"]
    (only,) = parts.parts(study_tables.build(QUANTIZED, spec(rows=["transform"], columns=[], metrics=metrics)))
    assert [name for name, *_ in only.display.columns] == ["kl_divergence", "perplexity", "stored_bits_per_weight"]


def test_no_part_is_wider_than_eight_columns():
    many = [RECORDS[RECORDS.cell == "1"].assign(cell=f"c{at}", mitigation=f"way-{at}") for at in range(15)]
    table = study_tables.build(pd.concat(many), spec(rows=["transform"]))
    found = parts.parts(table)
    assert [len(part.display.columns) for part in found] == [7, 7, 1, 7, 7, 1]
    joined = pd.concat([part.values for part in found], axis=1)
    assert set(joined.columns) == set(table.values.columns)


def test_values_that_overlap_are_drawn_as_paired_differences():
    marks = study_figures.points(QUANTIZED, spec())
    rtn = marks[(marks.cell == "1")].iloc[0]
    assert rtn.value == pytest.approx(0.5, abs=0.01) and rtn.high - rtn.low < 0.02
    assert "less that of full precision (paired)" in study_figures.caption(QUANTIZED, spec())
    assert differences.differs(QUANTIZED, "negative_log_likelihood", "docs")
    assert not differences.differs(QUANTIZED, "kl_divergence", "docs")
    words = study_figures.plot(QUANTIZED, spec())._supxlabel.get_text()
    assert "Full precision, measured like a cell: " in words


def test_models_are_the_series_where_nothing_else_is():
    both = pd.concat([results(name, name)[0] for name in ("a", "b")])
    both = both[both.format.isin(["w4a16_g64", "bf16"]) & (both["transform"] == "none")]
    figure = {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "kl_divergence", "scale": "log"}
    marks = study_figures.points(both, {"study": "s", "figure": figure})
    assert set(marks[~marks.baseline].series) == {"a", "b"} and set(marks[~marks.baseline].panel) == {""}
    linear = study_figures.points(both, {"study": "s", "figure": {**figure, "scale": "linear"}})
    assert set(linear[~linear.baseline].panel) == {"a", "b"}


def test_wide_tables_of_documents_are_split_with_their_labels():
    heads = ["model", *(f"{metric}<br>{at}" for metric in ("perplexity", "KL divergence") for at in range(5))]
    lines = [heads, [":--", *["--:"] * 10], ["m", *map(str, range(10))]]
    text = "before\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\nafter\n"
    split = wide_tables.split_text(text)
    assert split.index("KL divergence:") < split.index("perplexity:")
    assert "| m | 5 | 6 | 7 | 8 | 9 |" in split and "| m | 0 | 1 | 2 | 3 | 4 |" in split
    assert wide_tables.split_text(split) == split and split.startswith("before\n") and split.endswith("after\n")
    plain = [["case", *"abcdefghij"], [":--", *["--:"] * 10], ["m", *map(str, range(10))]]
    found = wide_tables.split([f"| {' | '.join(line)} |" for line in plain])
    assert found[0] == "| case | a | b | c | d | e | f | g |" and found[-1] == "| m | 7 | 8 | 9 |"
