"""Cells whose training kept its start: recorded by jobs, counted in results, and marked wherever a
cell is shown."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_claims import CONFIG as CLAIMS_CONFIG

import fit_transform
import measure_distributions
import measure_residual_error
import quantize_model
import train_mitigation
from learned_cases import Given
from quantgrid.config import check
from quantgrid.config.cells import Cell, baseline
from quantgrid.config.deployments import DEPLOYMENTS
from quantgrid.ground.storage import read_json
from quantgrid.inference.transform import Transform
from quantgrid.learning import outcomes
from quantgrid.learning.training import Learned
from quantgrid.learning.transformed import Trained
from quantgrid.mitigations.methods import tune_scales
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.plan.pipeline import Plan
from quantgrid.quantization.cached import quantize_decoder
from quantgrid.reporting.claims import findings, verdicts
from quantgrid.reporting.claims.recommendation import candidates, recommend
from quantgrid.reporting.claims.recommendation_text import text
from quantgrid.reporting.data import collection, descriptions, published, starts
from quantgrid.reporting.figures import pareto, residual_error, study_figures
from quantgrid.reporting.page import report, study_sections
from quantgrid.reporting.tables import comparisons, study_tables, writers
from quantgrid.transforms.recipes import flatquant
from tiny_decoders import VARIED

TURN, LEARNED, HALF = (Cell("m", name, "rtn", "channel", "int4") for name in ("turn", "learned", "half"))
FULL = baseline("m")
ENDS = {
    TURN: {},
    LEARNED: {"transform": {"all": "start"}},
    HALF: {"transform": {"0": "start", "1": "learned", "2": "start"}},
}
WINDOWS = np.random.default_rng(0).normal(3.0, 0.3, 16)


def ends(parts: dict[str, str]) -> dict[str, dict]:
    return {
        part: {"start": 1.0, "end": 0.5 if kept == "learned" else 1.5, "kept": kept} for part, kept in parts.items()
    }


def evaluations() -> dict[Cell, dict]:
    """Of full precision and three cells, each 0.1 nats above the last; ``learned`` and ``half``
    were trained."""
    protocol = {
        "name": "token perplexity",
        "corpus": "docs",
        "window": 64,
        "windows": 16,
        "tokens": 1024,
        "dtype": "float32",
    }
    found = {}
    for number, cell in enumerate((FULL, *ENDS)):
        losses = WINDOWS + 0.1 * number + np.random.default_rng(number).normal(0, 0.01, 16)
        summary = {"bits": 4.0, "stored_bits": 4.0, "online_operations": 10, "added_bits": 0.0}
        error = {
            "status": "ok",
            "summary": summary,
            "linears": {"0.q": {}},
            "trainings": {name: ends(parts) for name, parts in ENDS.get(cell, {}).items()},
        }
        measured = {
            "status": "ok",
            "protocol": protocol,
            "windows": {"negative_log_likelihood": losses.tolist(), "kl_divergence": [0.1] * 16},
        }
        found[cell] = {"error": error, "perplexity.docs": measured}
    return found


@pytest.fixture(scope="module")
def records() -> pd.DataFrame:
    return collection.records(evaluations())


@pytest.fixture(scope="module")
def items() -> pd.DataFrame:
    return collection.items(evaluations())


def spec(**more) -> dict:
    return {
        "study": "s",
        "title": "S",
        "table": {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity"]},
        **more,
    }


def figure_of(kind: str, **more) -> dict:
    return spec(
        figure={"kind": kind, "x": "transform", "hue": "mitigation", "metric": "perplexity", "scale": "log", **more}
    )


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "state", "parts"),
    [
        ({}, "", ""),
        ({"transform": ends({"all": "learned"})}, "none", "transform 0 of 1"),
        ({"transform": ends({"all": "start"})}, "all", "transform 1 of 1"),
        ({"transform": ends({"0": "learned", "1": "start"})}, "some", "transform 1 of 2"),
        (
            {"transform": ends({"all": "start"}), "mitigation": ends({"0": "learned", "1": "learned"})},
            "all",
            "transform 1 of 1; mitigation 0 of 2",
        ),
        (
            {"transform": ends({"all": "learned"}), "mitigation": ends({"0": "learned", "1": "start"})},
            "some",
            "transform 0 of 1; mitigation 1 of 2",
        ),
    ],
)
def test_the_columns_count_parts_of_every_training(trained, state, parts):
    assert outcomes.columns(trained) == {"start_kept": state, "start_kept_parts": parts}


def test_every_record_of_a_cell_says_what_its_training_kept(records, tmp_path):
    assert list(records.columns[-2:]) == ["start_kept", "start_kept_parts"]
    found = records.drop_duplicates("cell").set_index("transform").drop(index="none")
    assert found.start_kept.to_dict() == {"turn": "", "learned": "all", "half": "some"}
    assert (
        found.start_kept_parts["half"] == "transform 2 of 3" and records.groupby("cell").start_kept.nunique().max() == 1
    )
    collection.write(collection.merge([records]), tmp_path / "results.csv")
    assert collection.read(tmp_path / "results.csv").start_kept.tolist() == records.start_kept.tolist()


# -- what jobs record ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Given:
    return Given.make(tmp_path_factory.mktemp("made"), VARIED[1])


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of cells with a learned transform, rounded to nearest and by a mitigation that trains."""
    shape = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "intermediate_size": 128,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 32,
        "vocabulary": 100,
    }
    study = {
        "models": ["m"],
        "transforms": ["flatquant"],
        "mitigations": ["rtn", "tune_scales"],
        "granularities": ["channel"],
        "formats": ["int4"],
    }
    return Plan(
        check(
            {
                "models": {"m": {"source": "hub", "id": "a/b", "revision": "main", "shape": shape}},
                "evaluate": {"perplexity": ["evaluation"]},
                "corpora": {
                    name: {"source": "builtin", "part": name, "window": 64, "windows": 64}
                    for name in ("calibration", "evaluation")
                },
                "calibrations": {"default": {"corpus": "calibration"}},
                "studies": {"s": study},
            }
        )
    )


def ran(module, monkeypatch, step, **paths) -> None:
    """The job ``module`` in this process, with the specification of ``step``."""
    options = [option for name, path in paths.items() for option in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", [module.__name__, "--spec", json.dumps(step.spec), *options])
    module.main()


def layers_kept(made: Given) -> dict[str, dict]:
    return ends(dict.fromkeys(map(str, range(made.decoder.shape.layers)), "start"))


def fitted(made: Given, plan: Plan, monkeypatch, folder) -> Path:
    """The file of a learned transform whose training ended above its start in every layer."""
    monkeypatch.setattr(
        flatquant, "learn", lambda start, context, **options: Learned(start, fit_transform.HEADER, layers_kept(made))
    )
    ran(
        fit_transform,
        monkeypatch,
        plan.fit_transform(plan.studies["s"][1]),
        model=made.folder,
        statistics=made.folder / "statistics",
        windows=made.folder / "windows.safetensors",
        transform=folder / "t.safetensors",
        losses=folder / "losses.csv",
    )
    return folder / "t.safetensors"


def inputs(made: Given, folder, transform) -> dict:
    return {
        "model": made.folder,
        "transform": transform,
        "statistics": made.folder / "statistics",
        "checkpoint": folder / "model.safetensors",
        "manifest": folder / "quantgrid.json",
        "error": folder / "error.json",
    }


def test_a_training_that_went_up_reaches_all_that_jobs_write(made, plan, monkeypatch, tmp_path):
    transform, (_, cell, *_) = fitted(made, plan, monkeypatch, tmp_path), plan.studies["s"]
    ran(quantize_model, monkeypatch, plan.quantize_model(cell), **inputs(made, tmp_path, transform))
    ran(
        measure_distributions,
        monkeypatch,
        plan.measure_distributions(cell),
        model=made.folder,
        transform=transform,
        statistics=made.folder / "statistics",
        distribution=tmp_path / "described.json",
    )
    ran(
        measure_residual_error,
        monkeypatch,
        plan.measure_residual_error(cell, "evaluation"),
        model=made.folder,
        transform=transform,
        checkpoint=tmp_path / "model.safetensors",
        manifest=tmp_path / "quantgrid.json",
        windows=made.folder / "windows.safetensors",
        result=tmp_path / "residual_error.json",
    )
    for name in ("error", "quantgrid", "described", "residual_error"):
        content = read_json(tmp_path / f"{name}.json")
        assert outcomes.columns(content["trainings"]) == {
            "start_kept": "all",
            "start_kept_parts": "transform 2 of 2",
        }, name
    assert descriptions.read([tmp_path / "described.json"])[0].label == "flatquant (int4-channel) (start kept)"


def test_a_mitigation_that_trains_records_its_parts_beside_those_of_the_transform(made, plan, monkeypatch, tmp_path):
    def trained(recipe, context, **options):
        return Trained(
            quantize_decoder(made.decoder, replace(recipe, mitigation=rtn)),
            train_mitigation.HEADER,
            ends({"0": "learned", "1": "start"}),
        )

    monkeypatch.setattr(tune_scales, "tune_scales", trained)
    transform, (_, _, cell) = fitted(made, plan, monkeypatch, tmp_path), plan.studies["s"]
    ran(
        train_mitigation,
        monkeypatch,
        plan.quantize_model(cell),
        windows=made.folder / "windows.safetensors",
        losses=tmp_path / "l.csv",
        **inputs(made, tmp_path, transform),
    )
    for name in ("error", "quantgrid"):
        content = read_json(tmp_path / f"{name}.json")
        assert outcomes.columns(content["trainings"])["start_kept_parts"] == "transform 2 of 2; mitigation 1 of 2", name
    assert read_json(tmp_path / "error.json")["training"] == "scales"


def test_a_transform_that_is_not_learned_was_not_trained(tmp_path):
    Transform().save(tmp_path / "t.safetensors", {"status": "ok"})
    assert outcomes.of_transform(tmp_path / "t.safetensors") == {}


# -- what shows a cell -----------------------------------------------------------------------------


def test_tables_mark_the_cell_and_say_what_the_mark_means(records, tmp_path):
    table = study_tables.build(records, spec())
    shown = {labels[0]: texts[0] for labels, texts in zip(table.row_labels(), table.display.values)}
    assert [name for name, value in shown.items() if starts.MARK in value] == ["learned"]
    assert starts.LEGEND in writers.markdown(table) and r"$^\ddagger$" in writers.latex(table)
    numbers = writers.numbers(table)
    assert (
        numbers.columns[-1] == "start_kept"
        and numbers.set_index("transform").start_kept["learned"] == "perplexity | docs | rtn"
    )
    without = study_tables.build(records[records["transform"] != "learned"], spec())
    assert starts.MARK not in writers.markdown(without)


@pytest.mark.parametrize("kind", ["dots", "lines", "bars", "heatmap"])
def test_figures_have_a_hollow_mark_and_a_note(kind, records, tmp_path):
    asked = figure_of(kind)
    assert study_figures.points(records, asked).set_index("x").start_kept.to_dict() == {
        "turn": False,
        "learned": True,
        "half": False,
        "no transform": False,
    }
    drawn = study_figures.plot(records, asked)
    ax, words = drawn.axes[0], drawn._supxlabel.get_text().replace("\n", " ")
    assert (starts.LEGEND if kind == "heatmap" else starts.HOLLOW) in words and starts.WORDS in study_figures.caption(
        records, asked
    )
    if kind == "bars":
        assert sum(patch.get_facecolor() == (1.0, 1.0, 1.0, 1.0) for patch in ax.patches) == 1
    elif kind == "heatmap":
        assert sum(starts.MARK in one.get_text() for one in ax.texts) == 1
    else:
        (hollow,) = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
        assert (
            hollow.get_ydata()[0]
            == records[(records["transform"] == "learned") & (records.metric == "perplexity")].difference.iloc[0]
        )
    if kind != "heatmap":
        assert starts.WORDS in [entry.get_text() for entry in drawn.legends[0].get_texts()]
    plain = study_figures.plot(records.assign(start_kept=""), asked)
    assert starts.WORDS not in plain._supxlabel.get_text()


def test_records_of_earlier_versions_have_no_marks(records):
    old = records.drop(columns=["start_kept", "start_kept_parts"])
    assert (
        not starts.kept(old)
        and not study_tables.build(old, spec()).start_kept.any(axis=None)
        and not pareto.points(old, {}).start_kept.any()
    )


def test_comparisons_say_which_side_kept_its_start(records, items):
    asked = spec(compare={"axis": "transform", "to": "turn", "metrics": ["negative_log_likelihood"]})
    found = comparisons.evaluate(records, items, asked)
    assert found.set_index("transform").start_kept.to_dict() == {"learned": "cell", "half": ""}
    shown = writers.markdown(comparisons.table(found, asked))
    assert shown.count(f" {starts.MARK}**") + shown.count(f" {starts.MARK} ") == 1 and starts.LEGEND in shown
    asked["compare"]["to"] = "learned"
    assert set(comparisons.evaluate(records, items, asked).start_kept) == {"counterpart"}


def judged(records, items, *names) -> pd.DataFrame:
    terms = [{"weight": weight, "transform": name} for weight, name in zip((1, -1), names)]
    config = {
        **CLAIMS_CONFIG,
        "models": {"m": CLAIMS_CONFIG["models"]["small"]},
        "transforms": {name: {"method": "random_hadamard"} for name in ("turn", "learned", "half")},
    }
    return verdicts.evaluate(
        {"c": {"statement": "s", "terms": terms, "below": 0, "metric": "negative_log_likelihood"}},
        {},
        records,
        items,
        config,
    )


def test_claims_leave_a_comparison_with_such_a_cell_undecided(records, items, tmp_path):
    (row,) = judged(records, items, "turn", "learned").itertuples()
    assert row.p_adjusted < 1e-6 and row.high < 0 and row.outcome == row.verdict == "undecided"
    assert row.reason == f"start kept: {collection.cell_key(LEARNED)}"
    (free,) = judged(records, items, "turn", "half").itertuples()  # some parts alone decide
    assert free.outcome == "holds" and free.reason == ""
    collection.write(judged(records, items, "turn", "learned"), tmp_path / "claims.csv")
    found = findings.read(tmp_path / "claims.csv")
    page = report.build([], {"claims": found})
    assert found[0]["verdicts"]["m"]["start_kept"] == 1 and "1 with a start kept" in page and f"({row.reason})" in page


def test_recommendations_and_the_front_name_it(records, items):
    found = recommend(candidates(records, {}, "m"), items, DEPLOYMENTS["weights-activations+online"], 4.5)
    said = text(found, "title", 9)
    assert (
        found.set_index("cell").start_kept[collection.cell_key(LEARNED)]
        and "W4A4 INT4 channel learned + RTN (start kept)" in said
    )
    assert said.count("(start kept)") == 1 and f"start kept: {starts.MEANING}" in said
    marks = pareto.points(records, {})
    assert "Hollow" in pareto.CAPTION
    assert any(
        line.get_markerfacecolor() == "white" and len(line.get_xdata())
        for ax in pareto.plot(marks).axes
        for line in ax.lines
    )


def test_the_report_lists_trainings_that_kept_a_start_in_some_parts_or_all(records):
    section = report.StudySection(spec(), records)
    found = starts.lines([("s", records), ("again", records)])
    assert [(line["transform"], line["parts"], line["marked"], line["studies"]) for line in found] == [
        ("learned", "start kept in 1 of 1 parts of the transform", True, ["s", "again"]),
        ("half", "start kept in 2 of 3 parts of the transform", False, ["s", "again"]),
    ]
    page = report.build([section], {})
    assert (
        'id="starts"' in page
        and "start kept in 2 of 3 parts of the transform" in page
        and starts.LEGEND.replace("'", "&#39;") in page
    )
    assert 'id="starts"' not in report.build([report.StudySection(spec(), records[records["transform"] == "turn"])], {})


def test_published_numbers_stand_beside_a_marked_one(records):
    row = {
        **LEARNED.axes,
        "model": "x",
        "metric": "perplexity",
        "dataset": "docs",
        "window": "64",
        "value": 9.0,
        "table": "I",
        "confidence": "high",
    }
    called = {(axis, value): {value} for axis in LEARNED.axes for value in records[axis]}
    line = next(published.lines(SimpleNamespace(**row), records, called, pd.DataFrame(columns=published.COLUMNS)))
    assert line["start_kept"] and study_sections.published_line(line)["cells"][2][0].endswith(starts.MARK)


def test_the_growth_of_the_error_names_it(tmp_path):
    layers = [{"error": 0.1, "added": 0.1, "passed_on": 0.0}]
    for name, cell in (("a", TURN), ("b", LEARNED)):
        content = {
            "axes": {**cell.axes, "corpus": "docs"},
            "layers": layers,
            "trainings": {key: ends(parts) for key, parts in ENDS[cell].items()},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    table = residual_error.read([tmp_path / "a.json", tmp_path / "b.json"])
    assert [residual_error.names(row, table)[0] for _, row in table.iterrows()] == [
        "turn + RTN",
        "learned + RTN (start kept)",
    ]
