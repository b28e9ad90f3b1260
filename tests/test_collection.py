"""From the JSON of evaluations to tidy records: values, errors, paired differences, failed and missing cells, shared cells merged."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from in_process import run_script
from quantgrid.config import check
from quantgrid.errors import ConfigError
from quantgrid.evaluation.protocols import of_perplexity, of_task
from quantgrid.grid import Cell, baseline
from quantgrid.integrity import origin_of, write_record
from quantgrid.pipeline import Plan
from quantgrid.provenance import digest
from quantgrid.reporting import collection, figures, page, tables
from quantgrid.reporting.records import BEST, NUMBERS, STARTS, TEXTS, tidy
from quantgrid.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
FULL = baseline("m")
RTN, GPTQ = (Cell("m", "none", mitigation, "channel", "int4") for mitigation in ("rtn", "gptq"))
DRAWN = np.random.default_rng(0)
LOSSES = {FULL: DRAWN.normal(3.0, 0.3, 12)}
LOSSES |= {RTN: LOSSES[FULL] + DRAWN.normal(0.4, 0.05, 12), GPTQ: LOSSES[FULL] + DRAWN.normal(0.1, 0.02, 12)}
DIVERGENCES = {FULL: np.zeros(12), RTN: DRAWN.gamma(2.0, 0.2, 12), GPTQ: DRAWN.gamma(2.0, 0.05, 12)}
OUTCOMES = {FULL: [1, 1, 1, 0, 1, 0, 1, 1], RTN: [0, 1, 0, 0, 1, 0, 0, 1], GPTQ: [1, 1, 0, 0, 1, 0, 1, 1]}


def mean_error(values: np.ndarray) -> float:
    return np.std(values, ddof=1) / math.sqrt(len(values))


def perplexity(cell: Cell, **protocol: Any) -> dict[str, Any]:
    """The JSON of evaluate_perplexity."""
    windows = {"negative_log_likelihood": LOSSES[cell].tolist(), "kl_divergence": DIVERGENCES[cell].tolist()}
    corpus = {"corpus": "docs", "text_sha256": "ab", "join": "\n\n", "window": 64, "stride": 64, "windows": 12, "selection": "sequential",
              "tokens": 800, "tokenizer_sha256": "ef", "seed": 3, "axes": {"key": cell.path}, "versions": {"python": "3"}, **protocol}
    return {"status": "ok", "axes": cell.axes, "perplexity": 0.0, "stderr": 0.0, "windows": windows, "corpus": corpus,
            "model": {"weights_sha256": {"model.safetensors": f"weights of {cell.model}"}},
            "protocol": of_perplexity(corpus, protocol.get("dtype", "float32"))}


def tasks(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The JSON of evaluate_tasks, of one task."""
    outcomes = OUTCOMES[cell]
    result = {"metric": "acc", "value": float(np.mean(outcomes)), "stderr": float(mean_error(np.array(outcomes))), "count": 8, "outcomes": outcomes,
              "version": "1", "shots": 0, "documents_sha256": "cd", "lm_eval": "0.4", "task": "cloze", "source": "builtin", **changes}
    return {"status": "ok", "axes": cell.axes, "tasks": {"cloze": {**result, "protocol": of_task(result, 4, None, "float32")}}}


def error(cell: Cell) -> dict[str, Any]:
    """The JSON of the errors of quantize_model; full precision has its bits only."""
    quantized, full = {"bits": 4.5, "stored_bits": 4.25, "weight_sqnr_db": 18.5, "output_sqnr_db": 21.0}, {"bits": 16.0, "stored_bits": 16.0}
    summary = quantized if cell.quantized else full
    return {"status": "ok", "summary": summary, "linears": {"0.q": {}, "0.k": {}, "0.v": {}}}


def failed(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason}


def evaluations(*cells: Cell) -> dict[Cell, dict[str, dict[str, Any]]]:
    """cell -> evaluation -> its JSON, as a study with one corpus and one task has them."""
    return {cell: {"error": error(cell), "perplexity.docs": perplexity(cell), "tasks": tasks(cell)} for cell in cells}


def row(frame: pd.DataFrame, cell: Cell, metric: str) -> pd.Series:
    found = frame[(frame.cell == collection.cell_key(cell)) & (frame.metric == metric)]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture
def frame() -> pd.DataFrame:
    return collection.records(evaluations(FULL, RTN, GPTQ))


# -- values -------------------------------------------------------------------------------------------------------------------------------


def test_a_row_per_cell_and_metric_in_the_order_of_the_cells(frame):
    measured = ["perplexity", "negative_log_likelihood", "kl_divergence", "accuracy"]
    bits, noise = ["bits_per_weight", "stored_bits_per_weight"], ["weight_sqnr_db", "output_sqnr_db"]
    assert list(frame.metric) == bits + measured + 2 * (bits + noise + measured)
    assert list(frame.cell.unique()) == [collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)]
    assert {*TEXTS, *NUMBERS, *BEST, "protocol", *STARTS} == set(frame.columns) and set(frame.status) == {"ok"} and set(frame.reason) == {""}
    for cell in (FULL, RTN, GPTQ):
        own = frame[frame.cell == collection.cell_key(cell)]
        assert all((own[axis] == value).all() for axis, value in cell.axes.items())


def test_the_difference_to_the_best_cell_is_paired(frame):
    """Of the two quantized cells the better has zero against itself, the other the paired difference over the same windows."""
    losses = {cell: evaluations(cell)[cell]["perplexity.docs"]["windows"]["kl_divergence"] for cell in (RTN, GPTQ)}
    best = min(losses, key=lambda cell: np.mean(losses[cell]))
    for cell in (RTN, GPTQ):
        row = frame[(frame.cell == collection.cell_key(cell)) & (frame.metric == "kl_divergence")].iloc[0]
        gap = np.subtract(losses[cell], losses[best])
        assert row.best_difference == pytest.approx(gap.mean()) and row.best_difference_stderr == pytest.approx(gap.std(ddof=1) / len(gap) ** 0.5)
    assert frame[frame.mitigation == "none"].best_difference.isna().all()


def test_the_key_of_a_cell_is_that_of_its_axes():
    assert collection.cell_key(RTN) == digest({"model": "m", "transform": "none", "mitigation": "rtn", "granularity": "channel", "format": "int4"})
    assert len({collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)}) == 3


@pytest.mark.parametrize("cell", [FULL, RTN, GPTQ])
def test_perplexity_is_the_exponential_of_the_mean_loss(frame, cell):
    found = row(frame, cell, "perplexity")
    value = math.exp(LOSSES[cell].mean())
    assert found.value == pytest.approx(value, rel=1e-12) and found.stderr == pytest.approx(value * mean_error(LOSSES[cell]), rel=1e-12)
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
    expected = {"bits_per_weight": (4.5, "bits"), "stored_bits_per_weight": (4.25, "bits"), "weight_sqnr_db": (18.5, "dB"),
                "output_sqnr_db": (21.0, "dB")}
    for metric, (value, unit) in expected.items():
        found = row(frame, RTN, metric)
        assert (found.value, found.unit, found["count"], found.dataset) == (value, unit, 3, "")  # over three linears
        assert math.isnan(found.stderr) and math.isnan(found.difference)


def test_a_single_window_has_no_standard_error():
    content = {**perplexity(FULL), "windows": {"negative_log_likelihood": [3.0], "kl_divergence": [0.1]}}
    found = row(collection.records({FULL: {"perplexity.docs": content}}), FULL, "perplexity")
    assert found.value == pytest.approx(math.exp(3)) and pd.isna(found.stderr) and pd.isna(found.difference_stderr) and found.difference == 0


# -- paired differences -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [RTN, GPTQ])
def test_differences_are_paired_window_by_window(frame, cell):
    found = row(frame, cell, "negative_log_likelihood")
    gaps = LOSSES[cell] - LOSSES[FULL]
    assert found.difference == pytest.approx(gaps.mean(), rel=1e-12) and found.difference_stderr == pytest.approx(mean_error(gaps), rel=1e-12)
    assert found.difference_stderr < 0.5 * found.stderr  # the spread that the windows share has gone
    assert pd.isna(row(frame, cell, "kl_divergence").difference)  # is a difference to full precision already


@pytest.mark.parametrize("cell", [RTN, GPTQ])
def test_the_difference_of_perplexities_is_linearized_at_either_mean(frame, cell):
    found = row(frame, cell, "perplexity")
    value, other = math.exp(LOSSES[cell].mean()), math.exp(LOSSES[FULL].mean())
    assert found.difference == pytest.approx(value - other, rel=1e-12)
    assert found.difference_stderr == pytest.approx(mean_error(value * LOSSES[cell] - other * LOSSES[FULL]), rel=1e-12)
    resampled = np.random.default_rng(1).integers(0, 12, (4000, 12))  # a bootstrap over windows agrees with the linearization
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


@pytest.mark.parametrize("reference", [{}, {"perplexity.docs": failed("no factor"), "tasks": failed("no factor")},
                                       {"perplexity.more": perplexity(FULL)}])
def test_without_a_measured_baseline_there_is_no_difference(reference):
    frame = collection.records({FULL: reference, **evaluations(RTN)})
    assert row(frame, RTN, "perplexity").value > 0 and frame[frame.cell == collection.cell_key(RTN)].difference.isna().all()


# -- protocols ----------------------------------------------------------------------------------------------------------------------------


def test_every_row_of_an_evaluation_carries_its_protocol(frame):
    for record in frame[frame.metric.isin(["perplexity", "kl_divergence", "negative_log_likelihood"])].itertuples():
        content = json.loads(record.protocol)
        assert content["corpus"] == "docs" and content["text_sha256"] == "ab" and content["join"] == "\n\n" and content["dtype"] == "float32"
        assert (content["window"], content["stride"], content["normalization"], content["bos"]) == (64, 64, "token", False)
    content = json.loads(row(frame, RTN, "accuracy").protocol)
    assert {"task", "version", "metric", "shots", "lm_eval", "batch_size", "dtype"} <= set(content)


@pytest.mark.parametrize(("changes", "named"), [
    ({"window": 32}, "window 64 / 32"), ({"join": "\n"}, "join"), ({"text_sha256": "xy"}, "text_sha256 'ab' / 'xy'"),
    ({"add_bos": True, "bos_token_id": 1}, "bos False / True"), ({"dtype": "bfloat16"}, "dtype 'float32' / 'bfloat16'")])
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
    layout = {"study": "s", "table": {"rows": ["mitigation"], "columns": [], "metrics": ["perplexity"]},
              "figure": {"kind": "dots", "x": "mitigation", "metric": "perplexity"}}
    for draw in (tables.build, figures.points):
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
    assert mean.value == pytest.approx((first["value"] + 0.25) / 2) and mean.stderr == pytest.approx(math.hypot(first["stderr"], 0.1) / 2)
    assert mean.difference == pytest.approx(np.mean(np.subtract(OUTCOMES[RTN], OUTCOMES[FULL])))  # the two tasks have the same outcomes here
    assert set(json.loads(mean.protocol)["tasks"]) == {"cloze", "other"}


def test_a_task_that_failed_is_a_row_and_the_others_keep_their_numbers():
    found = evaluations(FULL, RTN, GPTQ)
    for cell in found:
        found[cell]["tasks"]["tasks"]["other"] = tasks(cell)["tasks"]["cloze"]
    found[RTN]["tasks"]["tasks"]["other"] = {"status": "failed", "reason": "tasks.other: the embedding has 512 rows", "source": "local"}
    frame = collection.records(found)
    own = frame[frame.cell == collection.cell_key(RTN)]
    broken = own[own.status == "failed"]
    assert list(broken.dataset) == ["other"] and list(broken.reason) == ["tasks.other: the embedding has 512 rows"]
    assert list(own[own.metric == "accuracy"].dataset) == ["cloze"] and "mean_accuracy" not in set(own.metric)
    assert len(own[own.metric == "perplexity"]) == 1
    spec = {"study": "s", "table": {"rows": ["mitigation"], "columns": ["transform"], "metrics": ["perplexity", "accuracy", "mean_accuracy"]}}
    shown = tables.build(tidy(frame), spec).display.loc["rtn"].to_numpy().ravel()
    assert ["failed" in str(value) for value in shown] == [False, False, True, True], "perplexity, cloze, other, the mean"
    drawn = {name: figures.points(frame, {"figure": {"kind": "dots", "x": "mitigation", "metric": name, "dataset": dataset}}).set_index("cell")
             for name, dataset in (("perplexity", "docs"), ("accuracy", "other"), ("mean_accuracy", ""))}
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
    assert means[other].best_difference_stderr == pytest.approx(gap.std(ddof=1) / len(gap) ** 0.5 / 2**0.5)  # two tasks that share no samples


def test_the_report_says_how_it_was_measured_and_of_what():
    other = baseline("n")
    found = {**evaluations(FULL, RTN), other: {"perplexity.docs": perplexity(FULL, tokenizer_sha256="gh")}}
    said, sums = page.protocol([found]), page.hashes([found])
    assert set(said) == {"docs, m", "docs, n", "cloze"} and "stride 64" in said["docs, m"] and "tokenizer_sha256 gh" in said["docs, n"]
    assert "shots 0" in said["cloze"] and "batch_size 4" in said["cloze"]
    assert sums == {"model m": "weights of m", "model n": "weights of m", "corpus docs": "ab", "task cloze": "cd"}


# -- failed and missing -------------------------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_one_row_with_its_reason_and_the_others_go_on():
    found = evaluations(FULL, RTN, GPTQ)
    found[RTN] = {"error": failed("layer 3: no Cholesky factor"), "perplexity.docs": failed("the checkpoint failed"), "tasks": failed("the same")}
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
    place = str(tmp_path / "evaluations" / "m" / "none" / "{}" / "channel" / "int4" / "perplexity" / "docs" / "0123456789.json")
    paths = {FULL: {"perplexity.docs": place.format("none")}, RTN: {"perplexity.docs": place.format("rtn")}}
    write_json(place.format("none"), perplexity(FULL))
    write_record("evaluate_perplexity", [place.format("none")])
    with pytest.raises(ConfigError, match=r"rtn.*0123456789\.json: this evaluation is not there; the code may have changed .* run it again"):
        collection.read_evaluations(paths)
    assert collection.read_evaluations(paths, missing_allowed=True) == {FULL: {"perplexity.docs": perplexity(FULL)}, RTN: {}}
    shutil.copytree(Path(place.format("none")).parents[4], Path(place.format("rtn")).parents[4])  # another cell's, record and all
    with pytest.raises(ConfigError, match=r"rtn.*0123456789\.json: evaluate_perplexity left no record of its content .*; delete it and run again"):
        collection.read_evaluations(paths, missing_allowed=True)
    Path(place.format("none")).write_text("{")
    damaged: dict[str, str] = {}
    assert collection.read_evaluations(paths, damaged=damaged) == {FULL: {}, RTN: {}}
    assert [*damaged] == [place.format("none"), place.format("rtn")] and "holds 1 bytes, not " in damaged[place.format("none")]


# -- files and studies --------------------------------------------------------------------------------------------------------------------


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


def saved(tmp_path: Path, *studies: dict[Cell, dict[str, dict[str, Any]]]) -> list[pd.DataFrame]:
    """The records of several studies as collect_results reads them."""
    for number, found in enumerate(studies):
        collection.write(collection.records(found), tmp_path / f"{number}.csv")
    return [collection.read(tmp_path / f"{number}.csv") for number in range(len(studies))]


def test_a_cell_that_studies_share_is_there_once(tmp_path):
    one, two = evaluations(FULL, RTN), evaluations(FULL, GPTQ, RTN)
    merged = collection.merge(saved(tmp_path, one, two))
    assert list(merged.cell.unique()) == [collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)]
    assert not merged.duplicated(["cell", "metric", "dataset"]).any() and len(merged) == 6 + 8 + 8
    pd.testing.assert_frame_equal(collection.merge(saved(tmp_path, one, one)).reset_index(drop=True),
                                  saved(tmp_path, one)[0].drop(columns=list(BEST)))


def test_a_shared_cell_keeps_all_that_any_study_measured_of_it(tmp_path):
    one, two = evaluations(FULL, RTN), evaluations(FULL, RTN)
    del one[RTN]["tasks"]
    two[RTN]["perplexity.more"] = perplexity(RTN, window=32)
    merged = collection.merge(saved(tmp_path, one, evaluations(GPTQ), two))
    assert list(merged.cell.unique()) == [collection.cell_key(cell) for cell in (FULL, RTN, GPTQ)]  # together, where it came first
    own = merged[merged.cell == collection.cell_key(RTN)]
    assert sorted(zip(own.metric, own.dataset))[:1] == [("accuracy", "cloze")] and (own.metric == "perplexity").sum() == 2


def test_a_failed_cell_of_two_studies_is_one_row(tmp_path):
    found = {**evaluations(FULL), RTN: {"perplexity.docs": failed("NaN in layer 2")}}
    merged = collection.merge(saved(tmp_path, found, found))
    assert list(merged[merged.status == "failed"].reason) == ["NaN in layer 2"]


def test_the_same_metric_under_two_protocols_stays_two_rows(tmp_path):
    one, two = evaluations(FULL), evaluations(FULL)
    two[FULL]["tasks"] = tasks(FULL, shots=5)
    assert (collection.merge(saved(tmp_path, one, two)).metric == "accuracy").sum() == 2
    two[FULL] = {"perplexity.docs": perplexity(FULL, axes={"key": "another"}, versions={"python": "4"}, seed=4)}  # who measured is no part of it
    assert (collection.merge(saved(tmp_path, one, two)).metric == "perplexity").sum() == 1


def test_the_scripts_collect_what_the_plan_names(tmp_path):
    """collect_study and collect_results on hand-written evaluations, at the paths of a plan; those of study b below a prefix."""
    shape = {"architecture": "LlamaForCausalLM", "hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 32,
             "vocabulary": 8}
    axes = {"models": ["m"], "transforms": ["none"], "granularities": ["channel"], "formats": ["int4"]}
    corpora = {name: {"source": "builtin", "part": part, "window": 64} for name, part in (("text", "calibration"), ("docs", "evaluation"))}
    plan = Plan(check({"results_dir": str(tmp_path), "models": {"m": {"source": "hub", "id": "a/b", "revision": "main", "shape": shape}},
                       "corpora": corpora, "calibrations": {"default": {"corpus": "text"}}, "evaluate": {"perplexity": ["docs"]},
                       "studies": {"a": {**axes, "mitigations": ["rtn"]}, "b": {**axes, "mitigations": ["gptq", "rtn"]}}}))
    assert plan.cells == [FULL, RTN, GPTQ]
    place = {"a": "", "b": str(tmp_path / "store")}
    for study in plan.studies:
        for cell, paths in plan.evaluations(study).items():
            for name, path in paths.items():
                Path(place[study] + path).parent.mkdir(parents=True, exist_ok=True)
                Path(place[study] + path).write_text(json.dumps(evaluations(cell)[cell][name]))
                write_record(origin_of(path).rule, [place[study] + path])
    options = {study: ("--spec", plan.study_spec(study), "--first", place[study] + plan.study_inputs(study)[0],
                       "--records", str(tmp_path / f"{study}.csv"), "--items", str(tmp_path / f"{study}.parquet")) for study in plan.studies}
    for study in plan.studies:
        assert run_script("collect_study", *options[study]).stderr == ""
    outputs = [option for name in ("csv", "parquet", "cells") for option in (f"--{name}", str(tmp_path / f"all.{name}"))]
    studies = [str(tmp_path / f"{study}.csv") for study in plan.studies]
    done = run_script("collect_results", "--spec", plan.reporting_spec("collect_results"), "--studies", *studies, *outputs)
    assert done.returncode == 0, done.stderr
    expected = collection.records(evaluations(FULL, RTN, GPTQ))
    merged = collection.read(tmp_path / "all.csv")
    assert list(merged.cell) == list(expected.cell[expected.metric != "accuracy"])
    assert list(csv.DictReader((tmp_path / "all.cells").read_text().splitlines())) == [
        {"cell": collection.cell_key(cell), **cell.axes, "status": "ok"} for cell in (FULL, RTN, GPTQ)]
    items = pd.read_parquet(tmp_path / "b.parquet")
    windows = evaluations(GPTQ)[GPTQ]["perplexity.docs"]["windows"]
    for metric in ("negative_log_likelihood", "kl_divergence"):
        own = items[(items.cell == collection.cell_key(GPTQ)) & (items.metric == metric) & (items.dataset == "docs")]
        assert own.value.tolist() == windows[metric] and own.item.tolist() == list(range(len(windows[metric])))
    assert set(items.metric) == {"negative_log_likelihood", "kl_divergence"} and items.cell.nunique() == 3
    Path(plan.evaluations("a")[RTN]["perplexity.docs"]).unlink()
    done = run_script("collect_study", *options["a"])
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "this evaluation is not there" in done.stderr
