"""Steps of races: candidates, first looks, decisions, and what an addition computes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from plan_cases import content, plan, steps
from quantgrid.config import check
from quantgrid.config.races import deployment_kind, planned_bits
from quantgrid.ground.errors import ConfigError
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


def test_a_decision_asks_for_the_candidates_that_the_one_before_it_keeps():
    made = plan(raced())
    [race] = made.raced["best"]
    first, second, _ = made.decisions(race)
    wildcards = [SimpleNamespace(**step.wildcards, items=step.wildcards.items) for step in (first, second)]
    asked = made.decision_inputs(wildcards[0], None)
    assert len(asked["shards"]) == len(asked["errors"]) == 12 and asked["previous"] == []
    survivors = [cell.path for cell in race.candidates[3:5]]
    later = made.decision_inputs(wildcards[1], {"survivors": survivors})
    assert later["previous"] == [first.outputs["decision"]] and later["errors"] == []
    assert later["shards"] == [made.look(race, cell, 1).outputs["result"] for cell in race.candidates[3:5]]
    assert first.digest in later["digests"]


def test_the_job_of_a_decision_plans_the_same_steps():
    made = plan(raced())
    [race] = made.raced["best"]
    step = made.decide_race(race, 1)
    spec = json.loads(made.decision_spec(SimpleNamespace(**step.wildcards, items=step.wildcards.items)))
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
    found = made.evaluations("best", [cell])
    assert list(found[cell]) == ["error", "perplexity.docs"] and list(found[race.candidates[-1]]) == ["error"]
    assert "/screening/" in found[cell]["error"] and set(made.all_evaluations()) == set(made.study_inputs("best"))


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
        (lambda c: c["corpora"]["race-text"].update(part="calibration"), "is the text that perplexity is evaluated on"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(change, message):
    config = raced()
    change(config)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert message in str(caught.value)


def test_a_thousand_candidates_are_planned_within_seconds():
    import time

    config = raced()
    config["mitigations"] = {f"m{i}": {"method": "low_rank", "rank": i} for i in range(50)}
    config["transforms"] = {f"t{i}": {"method": "scaling", "alpha": i / 20} for i in range(20)}
    axes = {axis: list(config[axis]) for axis in ("transforms", "mitigations")}
    config["studies"]["best"] |= {**axes, "models": ["big"], "formats": ["int4"]}
    begun = time.process_time()
    made = Plan(check(config))
    made.all_evaluations()
    assert len(made.raced["best"][0].candidates) == 1000 and time.process_time() - begun < 30
