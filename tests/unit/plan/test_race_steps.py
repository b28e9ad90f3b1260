"""Steps of races: candidates, first looks, decisions, and what an addition computes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from plan_cases import content, plan, steps
from quantgrid.config import check
from quantgrid.config.races import deployment_kind, planned_bits
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import SCRIPTS
from quantgrid.jobs.integrity import origin_of
from quantgrid.plan.pipeline import Plan

pytestmark = pytest.mark.usefixtures("in_the_repository")


def raced(**changes: Any) -> dict[str, Any]:
    """The config of the plan cases with one study, a race; ``changes`` are of the race."""
    config = content()
    config["corpora"]["race-text"] = {**config["corpora"]["docs"], "windows": 64, "skip_windows": 4}
    config["report"], config["exports"] = {}, []
    study = {**config["studies"]["methods"], "race": {"budget": 8, "windows": "race-text", "first": 16, **changes}}
    config["studies"] = {"best": {**study, "transforms": ["none", "smooth"], "formats": ["int4", "int8", "w4a16"]}}
    del config["studies"]["best"]["exclude"], config["studies"]["best"]["also"]
    return config


def loaded(name: str) -> ModuleType:
    """A script of the workflow as a module."""
    found = spec_from_file_location(name, SCRIPTS / f"{name}.py")
    script = module_from_spec(found)
    found.loader.exec_module(script)
    return script


def asked_with(step) -> SimpleNamespace:
    """Wildcards of a step as Snakemake passes them."""
    return SimpleNamespace(**step.wildcards, items=step.wildcards.items)


def test_candidates_are_the_cells_within_the_budget_and_of_the_kind():
    whole = plan(raced())
    [race] = whole.raced["best"]
    assert len(race.candidates) == 12 and {cell.format for cell in race.candidates} == {"int4", "w4a16"}
    assert all(planned_bits(whole.config, cell) <= 8 for cell in race.candidates)
    kinds = {cell.format: deployment_kind(whole.config, cell) for cell in race.candidates}
    assert kinds == {"int4": "w4a4", "w4a16": "w4a16"}
    [one] = plan(raced(kind="w4a16")).raced["best"]
    assert {cell.format for cell in one.candidates} == {"w4a16"} and len(one.candidates) == 6
    assert whole.studies["best"][0].mitigation == "none", "full precision is evaluated too"


def test_looks_have_the_shards_of_their_corpus():
    [race] = plan(raced()).raced["best"]
    assert list(map(str, race.shards)) == ["0-16", "16-32", "32-64"]
    assert race.conditions == {"looks": (16, 32, 64), "candidates": 12, "alpha": 0.05, "close": 0.05, "relative": True}


def test_the_first_look_keeps_no_checkpoint_and_has_the_inputs_of_both_of_its_parts():
    made = plan(raced())
    [race] = made.raced["best"]
    cell = race.candidates[0]
    step, quantized = made.look(race, cell, 0), made.quantize_model(cell)
    assert (step.rule, made.look(race, cell, 1).rule) == ("screen_cell", "evaluate_perplexity")
    assert step.inputs.keys() == {*quantized.inputs, "evaluated", "reference"} and "checkpoint" not in step.outputs
    assert {name: step.inputs[name] for name in quantized.inputs} == quantized.inputs
    assert step.inputs["evaluated"] == made.tokenize_all(race.model, race.corpus).outputs["windows"]
    assert step.spec["quantize_model"] == quantized.spec
    assert step.spec["evaluate_perplexity"]["shard"] == {"start": 0, "stop": 16}
    kept = plan({**raced(), "keep_checkpoints": True})
    assert kept.look(kept.raced["best"][0], cell, 0).rule == "evaluate_perplexity"


def test_both_results_of_a_first_look_have_the_axes_of_its_job(monkeypatch):
    made = plan(raced())
    [race] = made.raced["best"]
    step, started = made.look(race, race.candidates[0], 0), {}
    script = loaded("screen_cell")
    monkeypatch.setattr(script, "start", lambda rule, spec, files: started.update({rule: spec}))
    script.screen(
        SimpleNamespace(spec=step.spec, allocation=None, windows=None, **step.inputs, **step.outputs), SCRIPTS
    )
    for rule, output in (("quantize_model", "error"), ("evaluate_perplexity", "result")):
        assert started[rule]["axes"] == dict(origin_of(step.outputs[output]).axes) == step.wildcards
        assert {**started[rule], "axes": None} == {**step.spec[rule], "axes": None}


def test_a_decision_asks_for_the_candidates_that_the_one_before_it_keeps():
    made = plan(raced())
    [race] = made.raced["best"]
    first, second, _ = made.decisions(race)
    asked = made.decision_inputs(asked_with(first), None)
    assert len(asked["shards"]) == len(asked["errors"]) == 12 and asked["previous"] == []
    survivors = [cell.path for cell in race.candidates[3:5]]
    later = made.decision_inputs(asked_with(second), {"survivors": survivors})
    assert later["previous"] == [first.outputs["decision"]] and later["errors"] == []
    assert later["shards"] == [made.look(race, cell, 1).outputs["result"] for cell in race.candidates[3:5]]
    assert first.digest in later["digests"]


def test_the_job_of_a_decision_plans_the_same_steps():
    made = plan(raced())
    [race] = made.raced["best"]
    step = made.decide_race(race, 1)
    spec = json.loads(made.decision_spec(asked_with(step)))
    again = Plan(spec["config"])
    assert again.decide_race(again.race("best", "tiny"), 1).outputs == step.outputs
    assert [again.look(again.race("best", "tiny"), cell, 1) for cell in race.candidates] == [
        made.look(race, cell, 1) for cell in race.candidates
    ]


def test_a_new_candidate_changes_the_decisions_and_no_shard():
    def more(config: dict[str, Any]) -> dict[str, Any]:
        config["studies"]["best"]["transforms"].append("turn")
        return config

    before, now = steps(raced()), steps(more(raced()))
    assert {rule for rule, *rest in before if now.get((rule, *rest)) != before[(rule, *rest)]} == {"decide_race"}
    assert all("turn" in step for step in now.keys() - before.keys())


def test_more_windows_add_looks_and_change_no_shard():
    more = raced()
    more["corpora"]["race-text"]["windows"] = 128
    before, now = steps(raced()), steps(more)
    assert {rule for rule, *rest in before if now.get((rule, *rest)) != before[(rule, *rest)]} == {"decide_race"}
    assert {step[-1] for step in now.keys() - before.keys()} == {"64-128", "4"}


def test_evaluations_are_those_of_full_precision_and_of_the_finalists():
    made = plan(raced())
    [race] = made.raced["best"]
    full, cell = made.studies["best"][:2]
    assert list(made.evaluations("best")[full]) == ["error", "perplexity.docs"]
    assert list(made.evaluations("best")[cell]) == ["error"]
    found = made.evaluations("best", [{"pruned": {}, "survivors": [cell.path]}])
    assert list(found[cell]) == ["error", "perplexity.docs"] and list(found[race.candidates[-1]]) == ["error"]
    assert "/screening/" in found[cell]["error"] and set(made.all_evaluations()) == set(made.study_inputs("best"))


def test_a_race_that_prunes_quantizes_the_others_once_their_errors_are_predicted():
    made = plan(raced(prune=4))
    [race] = made.raced["best"]
    waiting = [cell for cell in race.candidates if cell.mitigation != "rtn"]
    assert (
        race.predictors == {cell.path: replace(cell, mitigation="rtn").path for cell in waiting} and len(waiting) == 8
    )
    before = made.evaluations("best")
    assert all(list(before[cell]) == ["error"] * (cell not in waiting) for cell in race.candidates)
    pruning, first, *_ = made.decisions(race)
    assert (pruning.wildcards["look"], first.wildcards["look"]) == ("0", "1")
    asked = made.decision_inputs(asked_with(pruning), None)
    assert asked["shards"] == asked["previous"] == [] and len(asked["errors"]) == 4
    assert set(asked["errors"]) == {made.measured(race, cell) for cell in race.candidates if cell not in waiting}
    later = made.decision_inputs(asked_with(first), {"survivors": [cell.path for cell in race.candidates[:5]]})
    assert later["previous"] == [pruning.outputs["decision"]] and len(later["shards"]) == len(later["errors"]) == 5
    out, kept = waiting[0], waiting[1]
    found = made.evaluations("best", [{"pruned": {out.path: "not raced"}, "survivors": [kept.path]}])
    assert found[out] == {} and list(found[kept]) == ["error", "perplexity.docs"]
    assert list(found[waiting[2]]) == ["error"]


def test_those_far_above_the_smallest_prediction_within_the_budget_are_left_out(monkeypatch):
    made = plan(raced(prune=4))
    [race] = made.raced["best"]
    errors = {"none/rtn/channel/int4": 0.9, "smooth/rtn/channel/int4": 0.2, "none/rtn/channel/w4a16": 0.04}
    bits = {"none/rtn/channel/w4a16": 99.0}  # beyond the budget, so that it predicts nothing
    results = {
        made.measured(race, race.named([f"tiny/{name}"])[0]): {
            "status": "ok",
            "summary": {"stored_bits": bits.get(name, 4.0)},
            "linears": {"0.q": {"joint_output_error": error / 2}, "0.k": {"joint_output_error": error / 2}},
        }
        for name, error in errors.items()
    }
    script = loaded("decide_race")
    monkeypatch.setattr(script, "read", lambda path: results.get(path, {"status": "failed"}))
    found = script.pruned(made, race, script.start(race), "")
    assert set(found["pruned"]) == {f"tiny/none/{name}/channel/int4" for name in ("lr8", "solved")}
    assert found["survivors"] == [cell.path for cell in race.candidates if cell.path not in found["pruned"]]
    assert found["ended"] == "" and found["looks"] == []


def test_nothing_else_quantizes_a_candidate_that_waits():
    config = {**raced(prune=4), "keep_checkpoints": True}
    config["studies"]["best"]["mitigations"] = ["rtn", "solved", "tuned"]
    made = plan(config)
    assert made.trainings() == {} and {path.split("/")[4] for path in made.all_checkpoints()} == {"none", "rtn"}
    config["studies"]["alone"] = {**config["studies"]["best"], "mitigations": ["solved"]}
    del config["studies"]["alone"]["race"]
    assert {path.split("/")[4] for path in plan(config).all_checkpoints()} == {"none", "rtn", "solved"}


def test_residual_errors_are_those_of_the_finalists():
    config = raced()
    config["studies"]["best"]["evaluate"] = {"perplexity": ["docs"], "residual_error": ["docs"]}
    made = plan(config)
    [race] = made.raced["best"]
    assert made.measures_residual_error() and made.residual_errors({}) == []
    kept = race.candidates[2]
    ends = {"best": [{"pruned": {}, "survivors": [kept.path]}]}
    assert made.residual_errors(ends) == [made.measure_residual_error(kept, "docs").outputs["result"]]
    assert not plan(raced()).measures_residual_error()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["studies"]["best"]["race"].update(windows="text-race"),
            "race.windows: unknown corpus 'text-race'",
        ),
        (lambda c: c["studies"]["best"]["race"].update(budget=3), "needs two candidates, and model 'tiny' has fewer"),
        (lambda c: c["studies"]["best"]["race"].update(kind="w2a16"), "their kinds are w4a16, w4a4, w8a8"),
        (lambda c: c["studies"]["best"]["race"].update(kind="4bit"), "race.kind"),
        (
            lambda c: c["studies"]["best"]["race"].update(first=8),
            "first look has 8 windows of 64 tokens; at least 1000",
        ),
        (lambda c: c["corpora"]["race-text"].pop("windows"), "a race needs the number of its windows"),
        (lambda c: c["corpora"]["race-text"].update(windows=4096), "a race has at most 6 looks"),
        (lambda c: c["corpora"]["race-text"].update(windows=8), "8 windows, and the first look takes 16"),
        (lambda c: c["corpora"]["race-text"].update(skip_windows=3), "shares windows with 'docs'"),
        (lambda c: c["studies"]["best"]["race"].update(alpha=1.5), "race.alpha"),
        (lambda c: c["studies"]["best"]["race"].update(prune=1), "race.prune"),
        (
            lambda c: c["studies"]["best"].update(
                mitigations=["lr8", "solved"], race={**c["studies"]["best"]["race"], "prune": 4}
            ),
            "race.prune: cells whose mitigation reads no statistics predict",
        ),
        (lambda c: c["corpora"]["race-text"].update(part="calibration"), "is the text that perplexity is evaluated on"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(change, message):
    config = raced()
    change(config)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert message in str(caught.value)


def test_a_thousand_candidates_are_planned():
    config = raced()
    config["mitigations"] = {f"m{i}": {"method": "low_rank", "rank": i} for i in range(50)}
    config["transforms"] = {f"t{i}": {"method": "scaling", "alpha": i / 20} for i in range(20)}
    axes = {axis: list(config[axis]) for axis in ("transforms", "mitigations")}
    config["studies"]["best"] |= {**axes, "models": ["big"], "formats": ["int4"]}
    made = Plan(check(config))
    assert len(made.raced["best"][0].candidates) == 1000
    assert len(set(made.all_evaluations())) == 1002, "the first look at every candidate, two of full precision"
