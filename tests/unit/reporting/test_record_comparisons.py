"""Paired differences between records, and protocols: cells measured in two ways are not compared."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from quantgrid.config.cells import Cell, baseline
from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.data import collection
from quantgrid.reporting.data.records import tidy
from quantgrid.reporting.figures import study_figures
from quantgrid.reporting.page import page_context
from quantgrid.reporting.tables import study_tables
from record_cases import (
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

# -- paired differences ----------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [RTN, GPTQ])
def test_differences_are_paired_window_by_window(frame, cell):
    found = row(frame, cell, "negative_log_likelihood")
    gaps = LOSSES[cell] - LOSSES[FULL]
    assert found.difference == pytest.approx(gaps.mean(), rel=1e-12) and found.difference_stderr == pytest.approx(
        mean_error(gaps), rel=1e-12
    )
    # the spread that the windows share has gone
    assert found.difference_stderr < 0.5 * found.stderr
    # is a difference to full precision already
    assert pd.isna(row(frame, cell, "kl_divergence").difference)


@pytest.mark.parametrize("cell", [RTN, GPTQ])
def test_the_difference_of_perplexities_is_linearized_at_either_mean(frame, cell):
    found = row(frame, cell, "perplexity")
    value, other = math.exp(LOSSES[cell].mean()), math.exp(LOSSES[FULL].mean())
    assert found.difference == pytest.approx(value - other, rel=1e-12)
    assert found.difference_stderr == pytest.approx(mean_error(value * LOSSES[cell] - other * LOSSES[FULL]), rel=1e-12)
    resampled = np.random.default_rng(1).integers(
        0, 12, (4000, 12)
    )  # a bootstrap over windows agrees with the linearization
    differences = np.exp(LOSSES[cell][resampled].mean(1)) - np.exp(LOSSES[FULL][resampled].mean(1))
    assert found.difference_stderr == pytest.approx(differences.std(), rel=0.15)


@pytest.mark.parametrize("cell", [RTN, GPTQ])
def test_differences_of_accuracies_are_paired_sample_by_sample(frame, cell):
    found = row(frame, cell, "accuracy")
    gaps = np.array(OUTCOMES[cell]) - np.array(OUTCOMES[FULL])
    assert found.difference == pytest.approx(gaps.mean()) and found.difference_stderr == pytest.approx(mean_error(gaps))


def test_the_baseline_differs_from_itself_by_nothing(frame):
    for metric in ("perplexity", "negative_log_likelihood", "accuracy"):
        assert row(frame, FULL, metric).difference == 0 and row(frame, FULL, metric).difference_stderr == 0


def test_each_model_is_compared_with_its_own_baseline():
    other = Cell("n", *list(RTN.axes.values())[1:])
    losses = {baseline("n"): LOSSES[FULL] + 1, other: LOSSES[FULL] + 1.5}
    found = evaluations(FULL, RTN)
    for cell, values in losses.items():
        content = perplexity(FULL)
        content["windows"]["negative_log_likelihood"] = values.tolist()
        found[cell] = {"perplexity.docs": content}
    assert row(collection.records(found), other, "negative_log_likelihood").difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    "reference",
    [{}, {"perplexity.docs": failed("no factor"), "tasks": failed("no factor")}, {"perplexity.more": perplexity(FULL)}],
)
def test_without_a_measured_baseline_there_is_no_difference(reference):
    frame = collection.records({FULL: reference, **evaluations(RTN)})
    assert (
        row(frame, RTN, "perplexity").value > 0
        and frame[frame.cell == collection.cell_key(RTN)].difference.isna().all()
    )


# -- protocols -------------------------------------------------------------------------------------


def test_every_row_of_an_evaluation_carries_its_protocol(frame):
    for record in frame[frame.metric.isin(["perplexity", "kl_divergence", "negative_log_likelihood"])].itertuples():
        content = json.loads(record.protocol)
        assert (
            content["corpus"] == "docs"
            and content["text_sha256"] == "ab"
            and content["join"] == "\n\n"
            and content["dtype"] == "float32"
        )
        assert (content["window"], content["stride"], content["normalization"], content["bos"]) == (
            64,
            64,
            "token",
            False,
        )
    content = json.loads(row(frame, RTN, "accuracy").protocol)
    assert {"task", "version", "metric", "shots", "lm_eval", "batch_size", "dtype"} <= set(content)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 32}, "window 64 / 32"),
        ({"join": "\n"}, "join"),
        ({"text_sha256": "xy"}, "text_sha256 'ab' / 'xy'"),
        ({"add_bos": True, "bos_token_id": 1}, "bos False / True"),
        ({"dtype": "bfloat16"}, "dtype 'float32' / 'bfloat16'"),
    ],
)
def test_cells_measured_in_two_ways_are_never_compared(changes, named):
    found = evaluations(FULL, RTN)
    found[RTN]["perplexity.docs"] = perplexity(RTN, **changes)
    with pytest.raises(ConfigError, match="not measured alike") as caught:
        collection.records(found)
    assert named in str(caught.value)


def test_tasks_run_in_two_ways_are_never_compared():
    found = evaluations(FULL, RTN)
    found[RTN]["tasks"] = tasks(RTN, shots=5)
    with pytest.raises(ConfigError, match=r"tasks on 'cloze' was not measured alike in cells .*: shots 0 / 5"):
        collection.records(found)


def test_models_may_differ_in_what_follows_from_their_tokenizers():
    other = Cell("n", *list(RTN.axes.values())[1:])
    changed = {"tokenizer_sha256": "gh", "tokens": 900}
    found = {**evaluations(FULL, RTN), other: {"perplexity.docs": {**perplexity(RTN, **changed), "axes": other.axes}}}
    assert len(collection.records(found).protocol[lambda texts: texts.notna()].unique()) == 3
    found[other] = {"perplexity.docs": perplexity(RTN, **changed, window=32)}
    with pytest.raises(ConfigError, match="window 64 / 32"):
        collection.records(found)


def test_a_table_of_records_that_differ_names_the_difference(tmp_path):
    one, two = evaluations(FULL, RTN), evaluations(FULL, GPTQ)
    for cell in two:
        two[cell]["perplexity.docs"] = perplexity(cell, window=32)
    both = pd.concat(saved(tmp_path, one, two)).drop_duplicates(["cell", "metric", "dataset"])
    layout = {
        "study": "s",
        "table": {"rows": ["mitigation"], "columns": [], "metrics": ["perplexity"]},
        "figure": {"kind": "dots", "x": "mitigation", "metric": "perplexity"},
    }
    for draw in (study_tables.build, study_figures.points):
        with pytest.raises(ConfigError, match="cannot stand in one table: window 64 / 32"):
            draw(both, layout)
    with pytest.raises(ConfigError, match="window 64 / 32"):  # one cell measured twice
        tidy(pd.concat(saved(tmp_path, one, two)))


def test_the_mean_over_tasks_counts_every_task_alike():
    found = evaluations(FULL, RTN)
    for cell in found:
        found[cell]["tasks"]["tasks"]["other"] = {**tasks(cell)["tasks"]["cloze"], "value": 0.25, "stderr": 0.1}
    frame = collection.records(found)
    mean = row(frame, RTN, "mean_accuracy")
    first = tasks(RTN)["tasks"]["cloze"]
    assert mean.value == pytest.approx((first["value"] + 0.25) / 2) and mean.stderr == pytest.approx(
        math.hypot(first["stderr"], 0.1) / 2
    )
    assert mean.difference == pytest.approx(
        np.mean(np.subtract(OUTCOMES[RTN], OUTCOMES[FULL]))
    )  # the two tasks have the same outcomes here
    assert set(json.loads(mean.protocol)["tasks"]) == {"cloze", "other"}


def test_a_task_that_failed_is_a_row_and_the_others_keep_their_numbers():
    found = evaluations(FULL, RTN, GPTQ)
    for cell in found:
        found[cell]["tasks"]["tasks"]["other"] = tasks(cell)["tasks"]["cloze"]
    found[RTN]["tasks"]["tasks"]["other"] = {
        "status": "failed",
        "reason": "tasks.other: the embedding has 512 rows",
        "source": "local",
    }
    frame = collection.records(found)
    own = frame[frame.cell == collection.cell_key(RTN)]
    broken = own[own.status == "failed"]
    assert list(broken.dataset) == ["other"] and list(broken.reason) == ["tasks.other: the embedding has 512 rows"]
    assert list(own[own.metric == "accuracy"].dataset) == ["cloze"] and "mean_accuracy" not in set(own.metric)
    assert len(own[own.metric == "perplexity"]) == 1
    spec = {
        "study": "s",
        "table": {
            "rows": ["mitigation"],
            "columns": ["transform"],
            "metrics": ["perplexity", "accuracy", "mean_accuracy"],
        },
    }
    shown = study_tables.build(tidy(frame), spec).display.loc["rtn"].to_numpy().ravel()
    assert ["failed" in str(value) for value in shown] == [False, False, True, True], (
        "perplexity, cloze, other, the mean"
    )
    drawn = {
        name: study_figures.points(
            frame, {"figure": {"kind": "dots", "x": "mitigation", "metric": name, "dataset": dataset}}
        ).set_index("cell")
        for name, dataset in (("perplexity", "docs"), ("accuracy", "other"), ("mean_accuracy", ""))
    }
    assert [drawn[name].status[collection.cell_key(RTN)] for name in drawn] == ["ok", "failed", "failed"]


def test_a_task_that_failed_in_full_precision_leaves_the_others_without_a_difference():
    found = evaluations(FULL, RTN)
    found[FULL]["tasks"]["tasks"]["cloze"] = {"status": "failed", "reason": "gone", "source": "local"}
    assert math.isnan(row(collection.records(found), RTN, "accuracy").difference)


def test_means_over_tasks_are_paired_with_the_best_task_by_task():
    found = evaluations(FULL, RTN, GPTQ)
    for cell in found:
        found[cell]["tasks"]["tasks"]["other"] = tasks(cell)["tasks"]["cloze"]
    frame = collection.records(found)
    means = {cell: row(frame, cell, "mean_accuracy") for cell in (RTN, GPTQ)}
    best = max(means, key=lambda cell: means[cell].value)
    (other,) = {RTN, GPTQ} - {best}
    gap = np.subtract(OUTCOMES[other], OUTCOMES[best])
    assert means[best].best_difference == 0 and means[other].best_difference == pytest.approx(gap.mean())
    assert means[other].best_difference_stderr == pytest.approx(
        gap.std(ddof=1) / len(gap) ** 0.5 / 2**0.5
    )  # two tasks that share no samples


def test_the_report_says_how_it_was_measured_and_of_what():
    other = baseline("n")
    found = {**evaluations(FULL, RTN), other: {"perplexity.docs": perplexity(FULL, tokenizer_sha256="gh")}}
    said, sums = page_context.protocol([found]), page_context.hashes([found])
    assert (
        set(said) == {"docs, m", "docs, n", "cloze"}
        and "stride 64" in said["docs, m"]
        and "tokenizer_sha256 gh" in said["docs, n"]
    )
    assert "shots 0" in said["cloze"] and "batch_size 4" in said["cloze"]
    assert sums == {"model m": "weights of m", "model n": "weights of m", "corpus docs": "ab", "task cloze": "cd"}
