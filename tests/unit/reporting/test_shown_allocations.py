"""Allocations in the report and in recommendations: predicted beside measured, against the best uniform scheme."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from plan_cases import content, plan
from quantgrid.config.cells import MIXED, baseline
from quantgrid.ground.places import ROOT
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.claims.recommendation import candidates, kinds, recommend
from quantgrid.reporting.claims.recommendation_text import text
from quantgrid.reporting.data import allocations, collection
from quantgrid.reporting.figures import allocations as figure_of_bits
from quantgrid.reporting.page import report

WINDOWS = 24
UNIFORM, PREDICTED = 0.010, 0.006  # nats per token
NAMES = ("w4a16", "w8a16 channel")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # the path of the tiny model is relative


@cache
def planned() -> Plan:
    return plan(content())


def evaluations(measured: float, noise: float = 0.05) -> dict[Any, dict[str, Any]]:
    """Evaluations of the study ``bits``: ``measured`` nats of the allocated cell, ``UNIFORM`` of the uniform one."""
    drawn = np.random.default_rng(0)
    windows = np.exp(drawn.normal(0, 0.3, WINDOWS))
    protocol = {
        "name": "token perplexity", "corpus": "docs", "text_sha256": "ab" * 32, "window": 64, "stride": 64,
        "bos": False, "normalization": "token", "dtype": "float32", "join": "", "windows": WINDOWS, "tokens": 1536,
    }  # fmt: skip
    found = {}
    for cell in planned().studies["bits"]:
        mean = 0.0 if not cell.quantized else measured if cell.granularity == MIXED else UNIFORM
        kl = mean * windows * np.exp(drawn.normal(0, noise, WINDOWS))
        bits = 16.0 if not cell.quantized else 5.9 if cell.granularity == MIXED else 5.0
        found[cell] = {
            "error": {
                "status": "ok",
                "summary": {"bits": bits, "stored_bits": bits, "added_bits": 0.0},
                "linears": {f"0.{linear}": {"size": 100} for linear in "qkvo"},
            },
            "perplexity.docs": {
                "status": "ok",
                "protocol": protocol,
                "windows": {"negative_log_likelihood": (2 + kl).tolist(), "kl_divergence": kl.tolist()},
            },
        }
        if cell.granularity == MIXED:
            schemes = {f"0.{linear}": NAMES[linear in "vo"] for linear in "qkvo"}
            uniform = {name: {"bits": 4.0 * (1 + at), "predicted_kl": 0.01} for at, name in enumerate(NAMES)}
            found[cell]["error"]["allocation"] = {"predicted_kl": PREDICTED, "schemes": schemes, "uniform": uniform}
            found[cell]["error"]["summary"]["predicted_kl_divergence"] = PREDICTED
    return found


def line_of(measured: float, noise: float = 0.05) -> dict[str, Any]:
    (line,) = allocations.lines(planned().config, [evaluations(measured, noise)])
    return line


@pytest.mark.parametrize(
    ("measured", "noise", "verdict"), [(0.007, 0.05, "better"), (0.0098, 0.5, "not told apart"), (0.013, 0.05, "worse")]
)
def test_an_allocation_is_compared_with_the_best_uniform_scheme_by_windows(measured, noise, verdict):
    line = line_of(measured, noise)
    assert line["verdict"] == verdict and line["uniform"] == "W4A16 channel RTN"
    assert line["uniform_bits"] == 5.0 and line["bits"] == 5.9 and line["limit"] == "6 bits"
    assert line["schemes"] == {"w4a16": 0.5, "w8a16 channel": 0.5}


@pytest.mark.parametrize(
    ("measured", "marked"), [(0.007, ""), (0.0025, "off by more than 1.5"), (0.011, "off by more than 1.5")]
)
def test_a_prediction_that_is_off_is_marked(measured, marked):
    line = line_of(measured)
    assert line["marked"] == marked and line["factor"] == pytest.approx(line["measured"] / PREDICTED)


def test_large_predictions_are_marked_whatever_was_measured():
    assert "do not add up" in allocations.distrusted(0.4, 0.4) and allocations.distrusted(0.2, 0.2) == ""


def test_schemes_are_shown_by_layer_and_group():
    line = line_of(0.007)
    assert line["groups"] == ["q, k", "v, o"]
    assert line["layers"][0][0] == "w4a16"
    assert line["shades"] == {"w4a16": 10, "w8a16 channel": 70}


def test_the_page_has_a_line_and_a_map_for_every_allocation():
    page = report.build([], {"allocated": [line_of(0.0025)]})
    assert page.count('aria-label="Allocations of bits"') == 1 and "off by more than 1.5" in page
    assert 'aria-label="Schemes of tiny, W4-8A16 shared mixed RTN, by layer and group of linears"' in page
    assert "w4a16 50 %" in page and 'href="#allocations"' in page
    assert 'id="allocations"' not in report.build([], {})


def test_records_have_the_prediction_of_an_allocation():
    found = collection.records(evaluations(0.007))
    row = found[found.metric == "predicted_kl_divergence"]
    assert list(row.value) == [PREDICTED] and list(row.granularity) == [MIXED] and list(row.unit) == ["nats/token"]


@pytest.mark.parametrize(
    ("measured", "noise", "kept"), [(0.007, 0.05, True), (0.0098, 0.5, False), (0.013, 0.05, False)]
)
def test_a_recommendation_has_the_uniform_scheme_where_the_test_does_not_separate_them(measured, noise, kept):
    made = evaluations(measured, noise)
    records, items = collection.records(made), collection.items(made)
    cells = candidates(records, content()["formats"], "tiny")
    found = recommend(cells, items, kinds(cells)[0], 6.0)
    assert list(found.granularity) == ([MIXED, "channel"] if kept else ["channel"])
    said = text(found, "title", 9)
    assert ("is in the place of shared: the paired test of divergences" in said) == (not kept)
    uniform = found[found.granularity != MIXED].iloc[0]
    assert uniform.replaces == ("" if kept else "shared")


def test_an_allocation_without_a_uniform_cell_stays():
    made = {cell: own for cell, own in evaluations(0.02).items() if cell.granularity in ("-", MIXED)}
    cells = candidates(collection.records(made), content()["formats"], "tiny")
    found = recommend(cells, collection.items(made), kinds(cells)[0], 6.0)
    assert list(found.granularity) == [MIXED] and baseline("tiny") in made


def test_the_figure_has_the_front_and_measured_marks(tmp_path):
    made, paths = evaluations(0.007), []
    for cell, own in made.items():
        if "allocation" in own["error"]:
            front = [{"bits": bits, "predicted_kl": 0.1 / bits**2} for bits in (4.0, 5.0, 6.0, 8.0)]
            error = {**own["error"], "axes": cell.axes, "allocation": {**own["error"]["allocation"], "front": front}}
            paths.append(tmp_path / "error.json")
            paths[0].write_text(json.dumps(error))
    marks = figure_of_bits.points(paths, collection.records(made))
    assert list(marks.kind.value_counts()[[figure_of_bits.FRONT, figure_of_bits.PREDICTED]]) == [4, 2]
    measured = marks[marks.kind.isin([figure_of_bits.MEASURED, figure_of_bits.ALLOCATED])].set_index("kind")
    assert measured.bits.to_dict() == {figure_of_bits.MEASURED: 5.0, figure_of_bits.ALLOCATED: 5.9}
    assert (measured.low < measured.divergence).all() and (measured.divergence < measured.high).all()
    figure = figure_of_bits.plot(marks)
    figure.draw_without_rendering()
    texts = [text.get_text() for text in (*figure.axes[0].texts, *figure.axes[0].get_yticklabels())]
    assert "shared" in texts and not any("$" in text for text in texts)
    assert figure_of_bits.plot(marks.iloc[:0]).axes
