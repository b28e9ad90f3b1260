"""From the JSON of evaluations to tidy records: values, errors, failed and missing cells, shared
cells merged."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from in_process import run_script
from quantgrid.config import check
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.provenance import digest
from quantgrid.ground.storage import write_json
from quantgrid.jobs.integrity import origin_of, write_record
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.data import collection
from quantgrid.reporting.data.records import BEST, NUMBERS, STARTS, TEXTS, tidy
from record_cases import (
    DIVERGENCES,
    FULL,
    GPTQ,
    LOSSES,
    OUTCOMES,
    RTN,
    evaluations,
    failed,
    mean_error,
    perplexity,
    row,
    saved,
    tasks,
)

# -- values ----------------------------------------------------------------------------------------


def test_a_row_per_cell_and_metric_in_the_order_of_the_cells(frame):
    measured = ["perplexity", "negative_log_likelihood", "kl_divergence", "accuracy"]
    bits, noise = ["bits_per_weight", "stored_bits_per_weight"], ["weight_sqnr_db", "output_sqnr_db"]
    assert list(frame.metric) == bits + measured + 2 * (bits + noise + measured)
    assert list(frame.cell.unique()) == [collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)]
    assert (
        {*TEXTS, *NUMBERS, *BEST, "protocol", *STARTS} == set(frame.columns)
        and set(frame.status) == {"ok"}
        and set(frame.reason) == {""}
    )
    for cell in (FULL, RTN, GPTQ):
        own = frame[frame.cell == collection.cell_key(cell)]
        assert all((own[axis] == value).all() for axis, value in cell.axes.items())


def test_the_difference_to_the_best_cell_is_paired(frame):
    """Of the two quantized cells the better has zero against itself, the other the paired
    difference over the same windows."""
    losses = {cell: evaluations(cell)[cell]["perplexity.docs"]["windows"]["kl_divergence"] for cell in (RTN, GPTQ)}
    best = min(losses, key=lambda cell: np.mean(losses[cell]))
    for cell in (RTN, GPTQ):
        row = frame[(frame.cell == collection.cell_key(cell)) & (frame.metric == "kl_divergence")].iloc[0]
        gap = np.subtract(losses[cell], losses[best])
        assert row.best_difference == pytest.approx(gap.mean()) and row.best_difference_stderr == pytest.approx(
            gap.std(ddof=1) / len(gap) ** 0.5
        )
    assert frame[frame.mitigation == "none"].best_difference.isna().all()


def test_the_key_of_a_cell_is_that_of_its_axes():
    assert collection.cell_key(RTN) == digest(
        {"model": "m", "transform": "none", "mitigation": "rtn", "granularity": "channel", "format": "int4"}
    )
    assert len({collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)}) == 3


@pytest.mark.parametrize("cell", [FULL, RTN, GPTQ])
def test_perplexity_is_the_exponential_of_the_mean_loss(frame, cell):
    found = row(frame, cell, "perplexity")
    value = math.exp(LOSSES[cell].mean())
    assert found.value == pytest.approx(value, rel=1e-12) and found.stderr == pytest.approx(
        value * mean_error(LOSSES[cell]), rel=1e-12
    )
    assert (found["count"], found.dataset, found.unit) == (12, "docs", "")


@pytest.mark.parametrize(("metric", "values"), [("negative_log_likelihood", LOSSES), ("kl_divergence", DIVERGENCES)])
def test_means_over_windows_carry_their_standard_error(frame, metric, values):
    for cell in (FULL, RTN, GPTQ):
        found = row(frame, cell, metric)
        assert found.value == pytest.approx(values[cell].mean(), rel=1e-12, abs=1e-15)
        assert found.stderr == pytest.approx(mean_error(values[cell]), rel=1e-12, abs=1e-15)
        assert (found["count"], found.dataset, found.unit) == (12, "docs", "nats/token")


def test_accuracy_and_errors_of_layers_are_taken_as_they_stand(frame):
    accuracy = row(frame, RTN, "accuracy")
    assert (accuracy.value, accuracy["count"], accuracy.dataset, accuracy.unit) == (3 / 8, 8, "cloze", "")
    assert accuracy.stderr == pytest.approx(mean_error(np.array(OUTCOMES[RTN])))
    expected = {
        "bits_per_weight": (4.5, "bits"),
        "stored_bits_per_weight": (4.25, "bits"),
        "weight_sqnr_db": (18.5, "dB"),
        "output_sqnr_db": (21.0, "dB"),
    }
    for metric, (value, unit) in expected.items():
        found = row(frame, RTN, metric)
        # over three linears
        assert (found.value, found.unit, found["count"], found.dataset) == (value, unit, 3, "")
        assert math.isnan(found.stderr) and math.isnan(found.difference)


def test_a_single_window_has_no_standard_error():
    content = {**perplexity(FULL), "windows": {"negative_log_likelihood": [3.0], "kl_divergence": [0.1]}}
    found = row(collection.records({FULL: {"perplexity.docs": content}}), FULL, "perplexity")
    assert (
        found.value == pytest.approx(math.exp(3))
        and pd.isna(found.stderr)
        and pd.isna(found.difference_stderr)
        and found.difference == 0
    )


# -- failed and missing ----------------------------------------------------------------------------


def test_a_failed_cell_is_one_row_with_its_reason_and_the_others_go_on():
    found = evaluations(FULL, RTN, GPTQ)
    found[RTN] = {
        "error": failed("layer 3: no Cholesky factor"),
        "perplexity.docs": failed("the checkpoint failed"),
        "tasks": failed("the same"),
    }
    frame = collection.records(found)
    own = frame[frame.cell == collection.cell_key(RTN)]
    assert len(own) == 1 and own.iloc[0].status == "failed" and own.iloc[0].reason == "layer 3: no Cholesky factor"
    assert pd.isna(own.iloc[0].metric) and pd.isna(own.iloc[0].value) and own.iloc[0].mitigation == "rtn"
    assert row(frame, GPTQ, "perplexity").difference > 0


def test_one_failed_evaluation_fails_its_cell():
    found = evaluations(FULL, RTN)
    found[RTN]["tasks"] = failed("task cloze: a log-likelihood is not finite")
    own = collection.records(found).iloc[6:]
    assert list(own.status) == ["failed"] and list(own.reason) == ["task cloze: a log-likelihood is not finite"]


def test_a_missing_file_is_named_unless_it_may_be_missing_and_a_damaged_one_always(tmp_path):
    place = str(
        tmp_path / "evaluations" / "m" / "none" / "{}" / "channel" / "int4" / "perplexity" / "docs" / "0123456789.json"
    )
    paths = {FULL: {"perplexity.docs": place.format("none")}, RTN: {"perplexity.docs": place.format("rtn")}}
    write_json(place.format("none"), perplexity(FULL))
    write_record("merge_shards", [place.format("none")])
    with pytest.raises(
        ConfigError,
        match=r"rtn.*0123456789\.json: this evaluation is not there; the code may have changed .* run it again",
    ):
        collection.read_evaluations(paths)
    assert collection.read_evaluations(paths, missing_allowed=True) == {
        FULL: {"perplexity.docs": perplexity(FULL)},
        RTN: {},
    }
    shutil.copytree(
        Path(place.format("none")).parents[4], Path(place.format("rtn")).parents[4]
    )  # another cell's, record and all
    with pytest.raises(
        ConfigError,
        match=r"rtn.*0123456789\.json: merge_shards left no record of its content .*; delete it and run again",
    ):
        collection.read_evaluations(paths, missing_allowed=True)
    Path(place.format("none")).write_text("{")
    damaged: dict[str, str] = {}
    assert collection.read_evaluations(paths, damaged=damaged) == {FULL: {}, RTN: {}}
    assert [*damaged] == [place.format("none"), place.format("rtn")] and "holds 1 bytes, not " in damaged[
        place.format("none")
    ]


# -- files and studies -----------------------------------------------------------------------------


def test_records_come_back_from_a_file_as_they_were(frame, tmp_path):
    collection.write(frame, tmp_path / "s.csv")
    again = collection.read(tmp_path / "s.csv")
    assert list(again.columns) == list(frame.columns) and len(again) == len(frame)
    for name in NUMBERS:
        assert np.array_equal(again[name].to_numpy(float), pd.to_numeric(frame[name]).to_numpy(float), equal_nan=True)
    assert not again[list(TEXTS)].isna().any(axis=None) and list(again.cell) == list(frame.cell)
    collection.write(again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()
    collection.write(again, tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "s.parquet"), again)
    assert len(tidy(again)) == len(frame)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "s.csv", "s.parquet"]


def test_a_cell_that_studies_share_is_there_once(tmp_path):
    one, two = evaluations(FULL, RTN), evaluations(FULL, GPTQ, RTN)
    merged = collection.merge(saved(tmp_path, one, two))
    assert list(merged.cell.unique()) == [collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)]
    assert not merged.duplicated(["cell", "metric", "dataset"]).any() and len(merged) == 6 + 8 + 8
    pd.testing.assert_frame_equal(
        collection.merge(saved(tmp_path, one, one)).reset_index(drop=True),
        saved(tmp_path, one)[0].drop(columns=list(BEST)),
    )


def test_a_shared_cell_keeps_all_that_any_study_measured_of_it(tmp_path):
    one, two = evaluations(FULL, RTN), evaluations(FULL, RTN)
    del one[RTN]["tasks"]
    two[RTN]["perplexity.more"] = perplexity(RTN, window=32)
    merged = collection.merge(saved(tmp_path, one, evaluations(GPTQ), two))
    assert list(merged.cell.unique()) == [
        collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)
    ]  # together, where it came first
    own = merged[merged.cell == collection.cell_key(RTN)]
    assert (
        sorted(zip(own.metric, own.dataset))[:1] == [("accuracy", "cloze")] and (own.metric == "perplexity").sum() == 2
    )


def test_a_failed_cell_of_two_studies_is_one_row(tmp_path):
    found = {**evaluations(FULL), RTN: {"perplexity.docs": failed("NaN in layer 2")}}
    merged = collection.merge(saved(tmp_path, found, found))
    assert list(merged[merged.status == "failed"].reason) == ["NaN in layer 2"]


def test_the_same_metric_under_two_protocols_stays_two_rows(tmp_path):
    one, two = evaluations(FULL), evaluations(FULL)
    two[FULL]["tasks"] = tasks(FULL, shots=5)
    assert (collection.merge(saved(tmp_path, one, two)).metric == "accuracy").sum() == 2
    two[FULL] = {
        "perplexity.docs": perplexity(FULL, axes={"key": "another"}, versions={"python": "4"}, seed=4)
    }  # who measured is no part of it
    assert (collection.merge(saved(tmp_path, one, two)).metric == "perplexity").sum() == 1


def test_the_scripts_collect_what_the_plan_names(tmp_path):
    """collect_study and collect_results on hand-written evaluations, at the paths of a plan; those
    of study b below a prefix."""
    shape = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "intermediate_size": 64,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 32,
        "vocabulary": 8,
    }
    axes = {"models": ["m"], "transforms": ["none"], "granularities": ["channel"], "formats": ["int4"]}
    corpora = {
        name: {"source": "builtin", "part": part, "window": 64}
        for name, part in (("text", "calibration"), ("docs", "evaluation"))
    }
    plan = Plan(
        check(
            {
                "results_dir": str(tmp_path),
                "models": {"m": {"source": "hub", "id": "a/b", "revision": "main", "shape": shape}},
                "corpora": corpora,
                "calibrations": {"default": {"corpus": "text"}},
                "evaluate": {"perplexity": ["docs"]},
                "studies": {"a": {**axes, "mitigations": ["rtn"]}, "b": {**axes, "mitigations": ["gptq", "rtn"]}},
            }
        )
    )
    assert plan.cells == [FULL, RTN, GPTQ]
    place = {"a": "", "b": str(tmp_path / "store")}
    for study in plan.studies:
        for cell, paths in plan.evaluations(study).items():
            for name, path in paths.items():
                Path(place[study] + path).parent.mkdir(parents=True, exist_ok=True)
                Path(place[study] + path).write_text(json.dumps(evaluations(cell)[cell][name]))
                write_record(origin_of(path).rule, [place[study] + path])
    options = {
        study: (
            "--spec",
            plan.study_spec(study),
            "--decisions",
            "--first",
            place[study] + plan.study_inputs(study)[0],
            "--records",
            str(tmp_path / f"{study}.csv"),
            "--samples",
            str(tmp_path / f"{study}.parquet"),
        )
        for study in plan.studies
    }
    for study in plan.studies:
        assert run_script("collect_study", *options[study]).stderr == ""
    outputs = [
        option for name in ("csv", "parquet", "cells") for option in (f"--{name}", str(tmp_path / f"all.{name}"))
    ]
    studies = [str(tmp_path / f"{study}.csv") for study in plan.studies]
    done = run_script(
        "collect_results", "--spec", plan.reporting_spec("collect_results"), "--studies", *studies, *outputs
    )
    assert done.returncode == 0, done.stderr
    expected = collection.records(evaluations(FULL, RTN, GPTQ))
    merged = collection.read(tmp_path / "all.csv")
    assert list(merged.cell) == list(expected.cell[expected.metric != "accuracy"])
    assert list(csv.DictReader((tmp_path / "all.cells").read_text().splitlines())) == [
        {"cell": collection.cell_key(cell), **cell.axes, "status": "ok"} for cell in (FULL, RTN, GPTQ)
    ]
    items = pd.read_parquet(tmp_path / "b.parquet")
    windows = evaluations(GPTQ)[GPTQ]["perplexity.docs"]["windows"]
    for metric in ("negative_log_likelihood", "kl_divergence"):
        own = items[(items.cell == collection.cell_key(GPTQ)) & (items.metric == metric) & (items.dataset == "docs")]
        assert own.value.tolist() == windows[metric] and own.item.tolist() == list(range(len(windows[metric])))
    assert set(items.metric) == {"negative_log_likelihood", "kl_divergence"} and items.cell.nunique() == 3
    Path(plan.evaluations("a")[RTN]["perplexity.docs"]).unlink()
    done = run_script("collect_study", *options["a"])
    assert (
        done.returncode == 1
        and len(done.stderr.strip().splitlines()) == 1
        and "this evaluation is not there" in done.stderr
    )
