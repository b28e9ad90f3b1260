"""Gates of a plan: one for each model and one for each model and transform, in no key."""

from __future__ import annotations

import pytest

from checkouts import ROOT
from plan_cases import content, plan
from quantgrid.config import entries
from quantgrid.ground import provenance
from quantgrid.machine.memory import WHOLE, parameters
from quantgrid.plan import cell_steps
from quantgrid.plan.gate_steps import FEW
from quantgrid.plan.steps import GATES


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # the path of the tiny model is relative


def test_every_quantized_cell_waits_for_its_gates_and_full_precision_for_none():
    found = plan(content())
    for cell in found.cells:
        rules = [gate.rule for gate in found.gates(cell)]
        if not cell.quantized:
            assert rules == []
        else:
            assert rules == ["gate_model"] + ["gate_transform"] * (cell.transform != "none")
            assert {gate.wildcards["model"] for gate in found.gates(cell)} == {cell.model}


def test_there_is_one_gate_for_a_model_and_one_for_each_of_its_transforms():
    found = plan(content())
    transforms = {cell.transform for cell in found.cells if cell.quantized} - {"none"}
    assert len(found.steps["gate_model"]) == 1
    assert {step.wildcards["transform"] for step in found.steps["gate_transform"].values()} == transforms
    assert len(found.steps["gate_transform"]) == len(transforms)


def test_the_gates_of_a_study_are_those_of_its_cells():
    found = plan(content())
    for study, cells in found.studies.items():
        wanted = {gate.digest for cell in cells for gate in found.gates(cell)}
        assert {gate.digest for gate in found.study_gates(study)} == wanted
        assert len(found.study_gates(study)) == len(wanted)


def test_a_gate_reads_no_text_that_quantized_cells_do_not_read():
    """Another evaluated corpus would change the path of a gate, and so quantize again."""
    found = plan(content())
    gates = [*found.steps["gate_model"].values(), *found.steps["gate_transform"].values()]
    assert {gate.inputs["windows"].split("/")[-2] for gate in gates} == {"text"}, "of the default calibration"
    edited = content()
    edited["corpora"]["docs"]["window"] = 48
    again = plan(edited)
    assert {gate.key for gate in gates} == {
        gate.key for rule in ("gate_model", "gate_transform") for gate in again.steps[rule].values()
    }


def gates_and_others(config) -> tuple[dict, dict]:
    """Steps by rule and name: gates, and all others."""
    found = {(rule, *axes): step for rule, steps in plan(config).steps.items() for axes, step in named(steps)}
    gates = {name: step for name, step in found.items() if name[0] in GATES}
    return gates, {name: step for name, step in found.items() if name[0] not in GATES}


def named(steps):
    return [(tuple(value for axis, value in step.wildcards.items() if axis != "key"), step) for step in steps.values()]


def test_an_edit_of_the_code_of_gates_runs_them_again_and_moves_no_path(monkeypatch):
    """Snakemake compares the specifications of jobs, and the input paths of the jobs that wait for them."""
    gates, others = gates_and_others(content())
    monkeypatch.setattr(
        cell_steps, "code_hash", lambda *code: "edited" if code[0] in GATES else provenance.code_hash(*code)
    )
    again, unchanged = gates_and_others(content())
    assert {name: step.outputs for name, step in again.items()} == {name: step.outputs for name, step in gates.items()}
    assert all(again[name].spec != step.spec for name, step in gates.items())
    assert unchanged == others


@pytest.mark.parametrize(
    ("edit", "moved"),
    [
        (lambda c: c["corpora"]["text"].update(window=48), {"gate_model": {"tiny"}, "gate_transform": {"all"}}),
        (lambda c: c["transforms"]["smooth"].update(alpha=0.6), {"gate_transform": {"smooth"}}),
        (
            lambda c: c["models"]["tiny"].update(path="tests/data/tiny-llama/"),
            {"gate_model": {"tiny"}, "gate_transform": {"all"}},
        ),
        (lambda c: c.update(threads=2), {"gate_transform": {"all"}}),
        (lambda c: c["mitigations"]["lr8"].update(rank=4), {}),
    ],
    ids=["corpus", "transform", "model", "threads", "mitigation"],
)
def test_what_a_gate_compares_moves_its_path(edit, moved):
    config = content()
    edit(config)
    gates, again = gates_and_others(content())[0], gates_and_others(config)[0]
    assert gates.keys() == again.keys()
    found: dict[str, set[str]] = {}
    for name, step in gates.items():
        if again[name].outputs != step.outputs:
            found.setdefault(name[0], set()).add(name[-1])
    transforms = {name[-1] for name in gates if name[0] == "gate_transform"}
    assert found == {rule: transforms if names == {"all"} else names for rule, names in moved.items()}


def test_only_the_first_layers_of_a_model_larger_than_memory_run():
    config = content()
    small, large = (dict(config["models"]["big"]["shape"]) for _ in range(2))
    large |= {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "layers": 32,
    }
    for shape, layers in ((small, None), (large, FEW)):
        config["models"]["big"]["shape"] = shape
        found = plan(config)
        step = found.gate_model("big")
        assert step.spec["layers"] == layers
        assert (4 * parameters(entries.shape(found.config, "big")) > WHOLE) == (layers is not None)
