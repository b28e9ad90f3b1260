"""Gates of a plan: one for each model and one for each fit of a transform, in no key."""

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


def fitted_twice():
    """A config whose last study has a transform that is fitted to the scheme, behind two formats."""
    config = content()
    config["transforms"]["learned"] = {"method": "optimized_rotation", "steps": 2}
    config["studies"]["learned"] = {
        **config["studies"]["methods"],
        "transforms": ["smooth", "learned"],
        "mitigations": ["rtn", "lr8"],
        "formats": ["int4", "int4-mse"],
        "exclude": [],
    }
    return config


@pytest.mark.parametrize("made", [content, fitted_twice])
def test_there_is_one_gate_for_a_model_and_one_for_each_fit(made):
    found = plan(made())
    assert len(found.steps["gate_model"]) == 1
    transformed = [cell for cell in found.cells if cell.quantized and cell.transform != "none"]
    fits = {found.fit_transform(cell).outputs["transform"] for cell in transformed}
    gated = [step.inputs["transform"] for step in found.steps["gate_transform"].values()]
    assert sorted(gated) == sorted(fits)
    names = [step.wildcards["transform"] for step in found.steps["gate_transform"].values()]
    assert (names.count("smooth"), names.count("learned")) == (1, 2 if made is fitted_twice else 0)


def test_a_cell_waits_for_no_other_fit():
    """A part of a run would take the time of a training that none of its cells uses."""
    found = plan(fitted_twice())
    for cell in (cell for cell in found.cells if cell.quantized):
        read = [gate.inputs["transform"] for gate in found.gates(cell) if gate.rule == "gate_transform"]
        assert read == [found.fit_transform(cell).outputs["transform"]] * (cell.transform != "none")


def test_cells_of_another_format_in_front_move_no_gate():
    config = fitted_twice()
    gates = gates_and_others(config)[0]
    first = {**config["studies"]["learned"], "formats": ["w8a8"]}
    config["studies"] = {"first": first, **config["studies"]}
    again = gates_and_others(config)[0]
    assert len(again) == len(gates) + 1
    assert all(again[name].outputs == gate.outputs for name, gate in gates.items())


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


def called(name):
    """The model of a gate of a model, the transform of another one."""
    return name[2] if name[0] == "gate_transform" else name[1]


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
            found.setdefault(name[0], set()).add(called(name))
    transforms = {called(name) for name in gates if name[0] == "gate_transform"}
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
