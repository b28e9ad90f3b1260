"""Before a run: its largest jobs by rule, and a refusal that says what has no room, where, and what
to do."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import yaml

from checkouts import ROOT
from quantgrid.config import check
from quantgrid.ground.errors import ConfigError
from quantgrid.machine.memory import disk_bytes, peak_mb
from quantgrid.models.shapes import ModelShape
from quantgrid.plan import preflight
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.preflight import Need, crowded, free_bytes, in_memory, needs, require_room
from quantgrid.plan.workload import kind

SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layers": 3,
    "heads": 16,
    "kv_heads": 2,
    "head_dim": 128,
    "vocabulary": 1000,
}
CONTENT = {
    "models": {
        name: {"source": "hub", "id": "a/b", "revision": "main", "shape": {**SHAPE, "layers": layers}}
        for name, layers in (("small", 3), ("deep", 30))
    },
    "corpora": {
        "text": {"source": "builtin", "part": "calibration", "window": 64, "windows": 20},
        "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 5},
    },
    "calibrations": {"default": {"corpus": "text"}},
    "transforms": {
        "trained": {"method": "optimized_rotation", "batch_size": 4},
        "fixed": {"method": "random_hadamard"},
    },
    "mitigations": {"low": {"method": "low_rank", "rank": 4}},
    "evaluate": {"perplexity": ["docs"]},
    "studies": {
        "s": {
            "models": ["small", "deep"],
            "transforms": ["none"],
            "mitigations": ["rtn"],
            "granularities": ["channel"],
            "formats": ["int4"],
        }
    },
}


def planned(**study) -> Plan:
    return Plan(check({**deepcopy(CONTENT), "studies": {"s": {**CONTENT["studies"]["s"], **study}}}))


def jobs(plan: Plan) -> list[tuple[str, SimpleNamespace]]:
    return [(step.rule, SimpleNamespace(**step.wildcards)) for steps in plan.all_steps().values() for step in steps]


def test_every_rule_is_there_with_its_largest_model():
    plan = planned()
    found = {need.job: need for need in needs(plan, [*jobs(plan), ("tabulate_study", SimpleNamespace(study="s"))])}
    assert set(found) == {
        "fetch_model",
        "tokenize_corpus",
        "calibrate_model",
        "fit_transform",
        "gate_model",
        "quantize_model",
        "evaluate_reference",
        "evaluate_perplexity",
        "merge_shards",
    }
    assert {found[job].model for job in ("fetch_model", "calibrate_model", "quantize_model")} == {"deep"}
    shape = plan_shape(30)
    assert found["calibrate_model"] == Need(
        "calibrate_model",
        "deep",
        peak_mb("calibrate_model", shape, 1280, 8 * 64) << 20,
        disk_bytes("calibrate_model", shape, 1280),
    )
    assert found["calibrate_model"].disk == 4 * 30 * (3 * 2048**2 + 8192**2), "float32 second moments"


def test_more_threads_than_cores_are_said_of_rules_that_compute():
    plan = Plan(check({**deepcopy(CONTENT), "threads": {"default": 2, "calibrate_model": 8}}))
    rules = {rule for rule, _ in jobs(plan)} | {"tabulate_study"}
    assert crowded(plan, rules, 8) == []
    assert crowded(plan, rules, 2) == [
        "calibrate_model has 8 threads on 2 cores: set `threads` in the config to at most the number of cores"
    ]
    assert [line.split()[0] for line in crowded(plan, rules, 1)] == [
        "calibrate_model",
        "evaluate_perplexity",
        "evaluate_reference",
        "fit_transform",
        "gate_model",
        "quantize_model",
    ]


def plan_shape(layers: int) -> ModelShape:
    return ModelShape(**{**SHAPE, "layers": layers})


def test_only_jobs_that_hold_the_whole_model_grow_with_its_depth():
    plain, whole = (
        planned(transforms=["fixed"], mitigations=["low"]),
        planned(transforms=["trained"], evaluate={"residual_error": ["docs"]}),
    )
    names = {need.job for need in needs(plain, jobs(plain))} | {need.job for need in needs(whole, jobs(whole))}
    assert {"learn_transform", "decompose_model", "quantize_model", "fit_transform", "measure_residual_error"} <= names
    growing = {job for job in names if peak_mb(job, plan_shape(100), 640) > peak_mb(job, plan_shape(30), 640)}
    assert growing == {"learn_transform", "gate_model"}, "up to a size, then it takes the first layers"
    assert peak_mb("gate_model", plan_shape(100)) == peak_mb("gate_model", plan_shape(1000))


def test_a_gguf_file_is_converted_in_memory_and_others_are_not():
    plan = planned()
    plan.config["models"]["deep"]["source"] = "wheel"
    kinds = [kind(plan.config, "fetch_model", SimpleNamespace(model=name)) for name in ("small", "deep")]
    assert kinds == ["fetch_model", "convert_model"]
    assert (
        peak_mb("convert_model", plan_shape(30))
        > peak_mb("fetch_model", plan_shape(30))
        == peak_mb("fetch_model", plan_shape(3))
    )


NEED = Need("calibrate_model", "deep", memory=10 * 10**9, disk=30 * 10**9)


@pytest.mark.parametrize(
    "memory, disk, local, words",
    [
        (16e9, 40e9, True, None),
        (8e9, 40e9, False, None),
        (
            8e9,
            40e9,
            True,
            [
                "calibrate_model of model 'deep'",
                "10.0 GB of memory",
                "this machine has 8.0 GB",
                "windows",
                "PROFILE=slurm",
            ],
        ),
        (16e9, 20e9, True, ["calibrate_model of model 'deep'", "30.0 GB", "20.0 GB left", "results_dir"]),
        (16e9, 20e9, False, ["30.0 GB", "results_dir"]),
    ],
)
def test_what_has_no_room_is_refused_by_name(memory, disk, local, words, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    monkeypatch.setattr(preflight, "disk_usage", lambda place: SimpleNamespace(free=disk))
    if words is None:
        require_room([NEED], tmp_path / "results", local)
        return
    with pytest.raises(ConfigError) as refused:
        require_room([NEED], tmp_path / "results", local)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("card, refused", [(None, False), (16e9, False), (8e9, True)])
def test_what_does_not_fit_on_the_gpu_is_refused_with_the_setting_to_change(card, refused, tmp_path):
    need = Need("evaluate_perplexity", "deep", memory=1, disk=1, card=10 * 10**9)
    assert str(need).endswith("10.0 GB of GPU memory") and "GPU" not in str(NEED)
    if not refused:
        require_room([need], tmp_path, False, card)
        return
    with pytest.raises(ConfigError, match=r"10\.0 GB of GPU memory .* has 8\.0 GB: lower `evaluation\.batch_size`"):
        require_room([need], tmp_path, False, card)


def test_memory_of_a_gpu_is_predicted_for_jobs_that_compute_on_it():
    plan = planned(transforms=["none", "trained"], mitigations=["rtn", "low"])
    found = {need.job: need.card for need in needs(plan, jobs(plan), card=True)}
    computing = {name for name, size in found.items() if size}
    assert computing == set(found) - {"fetch_model", "tokenize_corpus", "gate_model", "gate_transform", "merge_shards"}
    assert found["decompose_model"] > found["quantize_model"]
    wide = Plan(check({**deepcopy(CONTENT), "compute": {"dtype": "float32"}}))
    assert {need.job: need.card for need in needs(wide, jobs(wide), card=True)}["evaluate_reference"] > found[
        "evaluate_reference"
    ]
    assert not any(need.card for need in needs(plan, jobs(plan)))


@pytest.mark.parametrize(
    "device, card, local, here",
    [
        ("cpu", True, True, True),
        ("auto", False, True, True),
        ("auto", True, True, False),
        ("cuda", True, True, False),
        ("cpu", False, False, False),
    ],
)
def test_models_are_in_memory_where_jobs_run_here_and_on_no_card(device, card, local, here, tmp_path):
    if card:
        (tmp_path / "nvidia0").touch()
    plan = Plan(check({**deepcopy(CONTENT), "compute": {"device": device}}))
    assert in_memory(plan, local, str(tmp_path / "nvidia[0-9]*")) == here


def test_free_space_is_asked_of_the_nearest_folder_that_is_there(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_a_run_says_what_its_largest_jobs_take_and_stops_before_the_first_where_they_have_no_room(tmp_path):
    """Runs Snakemake itself; the check reads only the shape of the model."""
    huge = {**SHAPE, "hidden_size": 1 << 20, "intermediate_size": 1 << 21, "heads": 1 << 13}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {**CONTENT, "models": {**CONTENT["models"], "deep": {**CONTENT["models"]["deep"], "shape": huge}}}
        )
    )
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--configfile",
        str(path),
        "--cores",
        "1",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "largest jobs, as predicted" in done.stderr
    assert "of model 'deep' needs about" in done.stderr and "of memory at its peak, this machine has" in done.stderr
    assert not (tmp_path / "results" / "models").exists(), "nothing was started"
