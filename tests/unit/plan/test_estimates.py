"""Estimates of a run against operations counted by hand, and how they move with the config."""

from __future__ import annotations

from copy import deepcopy

import pytest

from quantgrid.config import check
from quantgrid.plan import estimates
from quantgrid.plan.pipeline import Plan

SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 64,
    "intermediate_size": 256,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocabulary": 1000,
}
LINEARS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256)
CONTENT = {
    "models": {"m": {"source": "hub", "id": "a/b", "revision": "main", "shape": SHAPE}},
    "corpora": {
        "text": {"source": "builtin", "part": "calibration", "window": 64, "windows": 10},
        "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 5},
    },
    "calibrations": {"default": {"corpus": "text"}},
    "mitigations": {"seq": {"method": "gptq", "propagation": "sequential"}, "lr": {"method": "low_rank", "rank": 4}},
    "evaluate": {"perplexity": ["docs"]},
    "studies": {
        "s": {
            "models": ["m"],
            "transforms": ["none"],
            "mitigations": ["rtn"],
            "granularities": ["channel"],
            "formats": ["int4"],
        }
    },
}
UNIT = estimates.Machine("slow", products=1.0, solver=1e30, requests=1e30, start=0.0, jobs=1)
SOLVER = estimates.Machine("slow", products=1e30, solver=1.0, requests=1e30, start=0.0, jobs=1)


def estimate(**changes) -> estimates.Estimate:
    study = {**CONTENT["studies"]["s"], **changes.pop("study", {})}
    return estimates.Estimate(Plan(check({**deepcopy(CONTENT), "studies": {"s": study}, **changes})))


def operations(found: estimates.Estimate, machine: estimates.Machine, rule: str) -> float:
    return found.hours(machine)[rule] * 3600


def test_forward_passes_count_two_operations_per_weight_and_token():
    found = estimate()
    assert found.jobs() == {
        "fetch_model": 1,
        "tokenize_corpus": 2,
        "calibrate_model": 1,
        "fit_transform": 1,
        "gate_model": 1,
        "quantize_model": 2,
        "evaluate_reference": 1,
        "evaluate_perplexity": 2,
        "merge_shards": 2,
    }
    assert operations(found, UNIT, "calibrate_model") == pytest.approx(2 * LINEARS * 640)
    assert operations(found, UNIT, "evaluate_reference") == pytest.approx(2 * LINEARS * 320)
    assert operations(found, UNIT, "evaluate_perplexity") == pytest.approx(2 * (2 * LINEARS * 320 + 4 * 64000 * 320))
    assert operations(found, SOLVER, "calibrate_model") == pytest.approx(2 * 640 * 3 * (3 * 64**2 + 256**2))


def test_solvers_cost_what_they_do():
    """GPTQ more than rounding, a decomposition too, sequential propagation five forward passes
    besides."""
    plain, solved, ranked = (
        operations(estimate(study={"mitigations": [name]}), SOLVER, "quantize_model") for name in ("rtn", "gptq", "lr")
    )
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (256, 64), (256, 64), (64, 256)]
    assert solved - plain == pytest.approx(3 * sum(2 * m * n * n + n**3 for m, n in linears))
    assert ranked - plain == pytest.approx(3 * sum(20 * m * n * min(m, n) for m, n in linears))
    assert operations(estimate(study={"mitigations": ["gptq"]}), UNIT, "quantize_model") == pytest.approx(0, abs=1e-6)
    assert operations(estimate(study={"mitigations": ["seq"]}), UNIT, "quantize_model") == pytest.approx(
        10 * LINEARS * 640
    )


def test_trainings_tasks_and_residual_errors_count():
    corpora = deepcopy(CONTENT["corpora"])
    corpora["text"]["windows"] = 18  # of which 16 are held out
    entry = {"method": "optimized_rotation", "steps": 7, "batch_size": 2}
    trained = estimate(transforms={"t": entry}, study={"transforms": ["t"]}, corpora=corpora)
    assert operations(trained, UNIT, "fit_transform") == pytest.approx(6 * LINEARS * 7 * 2 * 64)
    finish = {"method": "tune_scales", "steps": 7, "batch_size": 2}
    finished = estimate(mitigations={"f": finish}, study={"mitigations": ["f"]}, corpora=corpora)
    assert operations(finished, UNIT, "train_mitigation") == pytest.approx(6 * LINEARS * 7 * 2 * 64)
    assert finished.disk() == estimate().disk()
    cloze = {"cloze": {"source": "builtin", "kind": "cloze", "items": 10}}
    found = estimate(tasks=cloze, study={"evaluate": {"tasks": ["cloze"], "residual_error": ["docs"]}})
    assert operations(found, UNIT, "evaluate_tasks") == pytest.approx(
        2 * 2 * (LINEARS + 64000) * 2400
    )  # the baseline and one cell
    assert operations(found, UNIT, "measure_residual_error") == pytest.approx(6 * LINEARS * 4 * 64)


def test_disk_is_that_of_models_moments_references_and_checkpoints():
    assert estimate().disk() == {
        "models": 2.0 * (LINEARS + 128000),
        "calibration": 4.0 * 3 * (3 * 64**2 + 256**2),
        "references": 2.0 * 64 * 320,
        "checkpoints": pytest.approx(2 * (0.6 * LINEARS + 4 * 64000)),
    }
    assert estimate(keep_checkpoints=True, study={"mitigations": ["rtn", "lr"]}).disk()["checkpoints"] == pytest.approx(
        3 * (0.6 * LINEARS + 256000)
    )


def test_limits_of_jobs_are_some_times_their_estimate_between_an_hour_and_a_day():
    found = estimate()
    [step] = found.steps["calibrate_model"]
    work = 2 * LINEARS * 640 + 2 * 640 * 3 * (3 * 64**2 + 256**2)

    def machine(rate: float) -> estimates.Machine:
        return estimates.Machine("some", products=rate, solver=rate, requests=rate, start=5.0, jobs=9)

    assert found.seconds(step, machine(work / 1000)) == pytest.approx(1005), "side by side or not"
    assert found.minutes(step, machine(work / 1000)) == round(estimates.PATIENCE * 1005 / 60)
    assert (
        found.minutes(step, machine(1e30)) == estimates.SHORTEST
        and found.minutes(step, machine(1.0)) == estimates.LONGEST_JOB
    )


def test_the_text_names_cells_jobs_hours_and_disk():
    said = estimates.text(estimate().plan)
    assert said.startswith(
        "1 models, 1 studies, 2 cells, 13 jobs before the reports\nabout 6 minutes on one A100-class GPU ("
    )
    assert "2 CPU cores" in said and "GB of disk" in said and "a factor of two either way" in said
