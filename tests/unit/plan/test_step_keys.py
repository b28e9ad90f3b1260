"""Keys and paths: an edit of the config changes the keys of exactly those steps that depend on it."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from plan_cases import EVALUATIONS, TINY, after, all_of, changed, content, naming, plan, rules, steps, unedited
from quantgrid.ground.places import ROOT
from quantgrid.plan.steps import COMPUTING, OUTPUTS

pytestmark = pytest.mark.usefixtures("in_the_repository")
RACED = {"screen_cell", "decide_race"}  # no study of these tests has a race: test_race_steps.py


# -- what an edit changes --------------------------------------------------------------------------


def test_every_rule_has_steps_and_every_path_one_key():
    found = unedited()
    assert rules(found) == set(OUTPUTS) - RACED and len(set(found.values())) == len(found)
    assert all(re.fullmatch("[0-9a-f]{10}", key) for key in found.values())


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda c: c["transforms"]["smooth"].update(alpha=0.6), "smooth"),
        (lambda c: c["transforms"]["smooth"].update(sites=["mlp_input"]), "smooth"),
        (lambda c: c["transforms"]["turn"].update(seed=5), "turn"),
        (lambda c: c["mitigations"]["lr8"].update(rank=16), "lr8"),
        (lambda c: c["mitigations"]["lr8"].update(metric="qera_exact"), "lr8"),
        (lambda c: c["mitigations"]["solved"].update(damping=0.02), "solved"),
        (lambda c: c["mitigations"]["tuned"].update(steps=4), "tuned"),
        (lambda c: c["formats"]["int4-mse"]["weight"].update(mse_norm=2.0), "int4-mse"),
        (lambda c: c["formats"]["int4-mse"].update(activation=None), "int4-mse"),
    ],
)
def test_an_option_changes_the_steps_of_its_entry_and_no_other(edit, name):
    found = changed(edit)
    assert found == naming(name) and {
        "train_mitigation" if name == "tuned" else "quantize_model",
        "evaluate_perplexity",
    } <= rules(found)
    assert ("fit_transform" in rules(found)) == (name in ("smooth", "turn"))


def test_another_calibration_changes_the_steps_of_its_entry():
    before, now = unedited(), after(lambda config: config["mitigations"]["solved"].update(calibration="default"))
    assert {step for step in now if now[step] != before[step]} == naming("solved")
    assert before.keys() - now.keys() == {("calibrate_model", "tiny", "other"), ("tokenize_corpus", "tiny", "short")}


def test_a_method_in_the_place_of_another_changes_the_steps_of_its_entry():
    def edit(config: dict[str, Any]) -> None:
        config["mitigations"]["lr8"] = {"method": "gptq_low_rank", "rank": 8}

    assert changed(edit) == naming("lr8")


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["transforms"]["smooth"].update(
            alpha=0.5, sites=["attention_input", "mlp_input"], calibration="default"
        ),
        lambda c: c["mitigations"]["solved"].update(block_size=128, activation_order=False),
        lambda c: c["transforms"]["turn"].update(seed=3),
        lambda c: c["calibrations"]["default"].update(samples=256, skip_first=0),
        lambda c: c["formats"]["int4-mse"].update(activation={}),
        lambda c: c["formats"]["int4-mse"]["weight"].update(clip_ratio=1.0),
        lambda c: c.update(threads={"calibrate_model": 1}),
        lambda c: c.update(threads=1, keep_checkpoints=True, evaluation={"batch_size": 8}),
        lambda c: c["evaluate"].update(tasks=[]),
    ],
)
def test_a_default_that_is_written_out_changes_no_key(edit):
    assert changed(edit) == set()


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["studies"]["formats"].update(title="Another", description="Text", paper="Table I"),
        lambda c: c["studies"]["formats"].update(table={"rows": ["format"], "metrics": ["kl_divergence"]}),
        lambda c: c["studies"]["formats"].update(
            figure={"kind": "bars", "x": "format", "dataset": "more", "scale": "linear"}
        ),
        lambda c: c["report"].update(title="Another"),
        *(
            lambda c, at=at: c[at[0]][at[1]].update(note="a note")
            for at in (
                ("models", "tiny"),
                ("corpora", "docs"),
                ("corpora", "text"),
                ("transforms", "smooth"),
                ("mitigations", "lr8"),
                ("formats", "int4-mse"),
                ("tasks", "cloze"),
            )
        ),
    ],
)
def test_presentation_and_notes_change_no_key(edit):
    assert changed(edit) == set()


def test_the_seed_changes_all_that_draws_and_what_reads_it_but_not_the_model():
    found = changed(lambda config: config.update(seed=4))
    assert rules(found) == set(OUTPUTS) - {"fetch_model"} - RACED
    kept = ("none", "rotation-s0", "rotation-s1")  # have their own seeds, or none
    assert all_of("fit_transform") - found == {("fit_transform", "tiny", name, "any") for name in kept}
    assert all_of("quantize_model") - found == {("quantize_model", "tiny", name, "none", "-", "bf16") for name in kept}


def test_the_window_of_a_corpus_changes_what_reads_that_corpus():
    evaluated = changed(lambda config: config["corpora"]["more"].update(window=48))
    assert evaluated == naming("more") and rules(evaluated) == {
        "tokenize_corpus",
        "evaluate_reference",
        "evaluate_perplexity",
        "merge_shards",
    }
    calibrated = changed(lambda config: config["corpora"]["short"].update(window=48))
    assert calibrated == {("tokenize_corpus", "tiny", "short"), ("calibrate_model", "tiny", "other")} | naming("solved")


def test_tokens_that_a_calibration_leaves_out_change_what_is_calibrated_on_it():
    assert changed(lambda config: config["calibrations"]["other"].update(skip_first=1)) == {
        ("calibrate_model", "tiny", "other")
    } | naming("solved")


def test_the_corpus_of_calibration_changes_all_that_is_calibrated():
    found = changed(lambda config: config["calibrations"]["default"].update(samples=64))
    assert all_of("calibrate_model") & found == {("calibrate_model", "tiny", "default")}
    assert all_of("fit_transform") & found == {("fit_transform", "tiny", "smooth", "any")}
    assert all_of("measure_distributions") <= found
    uncalibrated = {step for step in all_of("quantize_model") if step[2] != "smooth" and step[3] in ("none", "solved")}
    assert all_of("quantize_model") - found == uncalibrated


def test_a_task_list_changes_its_tasks_only():
    assert changed(lambda config: config["studies"]["formats"]["evaluate"].update(tasks=["cloze"])) == all_of(
        "evaluate_tasks"
    )
    assert changed(lambda config: config["tasks"]["true"].update(items=4)) == all_of("evaluate_tasks")
    assert changed(lambda config: config["studies"]["formats"]["evaluate"].update(tasks=["true", "cloze"])) == set()


@pytest.mark.parametrize("edit", [lambda c: c.update(evaluation={"batch_size": 4})])
def test_the_batch_size_changes_evaluations_only(edit):
    """The card of an export shows an evaluation."""
    assert changed(edit) == all_of(*EVALUATIONS, "evaluate_reference", "export_model")


@pytest.mark.parametrize("edit", [lambda c: c.update(threads=2), lambda c: c["compute"].update(dtype="float64")])
def test_the_arithmetic_changes_all_that_computes(edit):
    """The gate of a model reads no step that computes, so that its path stays."""
    assert rules(changed(edit)) == set(OUTPUTS) - {"fetch_model", "tokenize_corpus", "gate_model"} - RACED


@pytest.mark.parametrize("rule", COMPUTING)
@pytest.mark.parametrize("default", [1, 2])
def test_threads_of_a_rule_are_its_own(rule, default):
    found = plan({**content(), "threads": {"default": default, rule: 3}})
    threads = {
        name: {step.spec["compute"]["threads"] for step in steps.values()}
        for name, steps in found.steps.items()
        if name in COMPUTING
    }
    assert threads == {name: {3 if name == rule else default} for name in COMPUTING}
    assert {name: found.threads(name) for name in COMPUTING} == {
        name: 3 if name == rule else default for name in COMPUTING
    }


def test_threads_of_a_rule_change_its_steps_and_what_reads_them():
    assert rules(changed(lambda c: c.update(threads={"evaluate_perplexity": 2}))) == {
        "evaluate_perplexity",
        "merge_shards",
        "export_model",
    }
    trained = rules(changed(lambda c: c.update(threads={"train_mitigation": 2})))
    assert trained == {"train_mitigation", *EVALUATIONS, "measure_residual_error"} & rules(unedited())


def test_another_revision_of_a_model_changes_all_of_its_steps():
    def both(config: dict[str, Any]) -> None:
        config["studies"]["formats"]["models"] = ["tiny", "big"]

    def newer(config: dict[str, Any]) -> None:
        both(config)
        config["models"]["big"]["revision"] = "v2"

    before, now = after(both), after(newer)
    assert {step for step in now if before[step] != now[step]} == {step for step in now if "big" in step}


def test_a_file_of_a_local_model_changes_all_of_its_steps(tmp_path, monkeypatch):
    shutil.copytree(ROOT / TINY, tmp_path / TINY)
    monkeypatch.chdir(tmp_path)
    before = steps(content())
    (tmp_path / TINY / "tokenizer_config.json").write_text("{}")
    now = steps(content())
    assert {step for step in now if now[step] == before[step]} == set()


# -- what an addition leaves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "new"),
    [
        (
            lambda c: c["studies"].update(third={**c["studies"]["formats"], "formats": ["int8"], "title": "Third"}),
            "int8",
        ),
        (lambda c: c["studies"]["formats"].update(models=["tiny", "big"]), "big"),
        (lambda c: c["studies"]["formats"]["mitigations"].append("gptq"), "gptq"),
        (
            lambda c: (
                c["corpora"].update(late={"source": "builtin", "part": "evaluation", "window": 16, "windows": 2}),
                c["studies"]["formats"]["evaluate"]["perplexity"].append("late"),
            ),
            "late",
        ),
        (lambda c: c["transforms"]["rotation"]["seeds"].append(2), "rotation-s2"),
    ],
)
def test_an_addition_brings_new_steps_and_changes_none(edit, new):
    before, now = unedited(), after(edit)
    assert before.items() <= now.items()
    added = now.keys() - before.keys()
    assert added and all(new in step for step in added)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["models"].update(third=c["models"]["big"]),
        lambda c: c["corpora"].update(third=c["corpora"]["docs"]),
        lambda c: c["transforms"].update(third={"method": "scaling", "alpha": 0.1}),
        lambda c: c["tasks"].update(third=c["tasks"]["cloze"]),
        lambda c: c["studies"].update(third=dict(c["studies"]["formats"])),
    ],
)
def test_an_entry_that_nothing_uses_and_a_study_of_shared_cells_bring_no_step(edit):
    assert after(edit) == unedited()


# -- the same content, the same keys ---------------------------------------------------------------


def shuffled(value: Any, drawn: random.Random) -> Any:
    """A copy with the keys of every mapping in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], drawn) for key in drawn.sample(list(value), len(value))}
    return [shuffled(item, drawn) for item in value] if isinstance(value, list) else value


def test_keys_follow_the_content_and_not_its_order():
    assert steps(content()) == unedited()
    for seed in range(3):
        assert steps(shuffled(content(), random.Random(seed))) == unedited()


def test_keys_are_the_same_in_another_process():
    code = (
        "import json, sys; from quantgrid.config.validation import check; from quantgrid.plan.pipeline import Plan;"
        "print('\\n'.join(Plan(check(json.loads(sys.argv[1]))).all_evaluations()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(content())],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "scripts"},
    )
    assert done.stdout.split() == plan(content()).all_evaluations(), done.stderr


def test_the_results_folder_moves_paths_and_changes_no_key(tmp_path):
    here, there = content(), {**content(), "results_dir": f"{tmp_path}/results/"}
    assert steps(here) == steps(there)
    assert [f"{tmp_path}/{path}" for path in plan(here).all_evaluations()] == plan(there).all_evaluations()


# -- allocations of bits ---------------------------------------------------------------------------


def shared(**changes: Any):
    """Edit of the allocation of the config."""
    return lambda config: config["formats"]["shared"]["allocate"].update(changes)


SOLVED = ("quantize_model", "evaluate_perplexity", "merge_shards")


@pytest.mark.parametrize("changes", [{"budget": 5.5}, {"groups": "linear"}])
def test_another_budget_solves_and_assembles_again_and_measures_nothing(changes):
    assert rules(changed(shared(**changes))) == {"allocate_bits", *SOLVED}


def test_alternatives_share_one_allocation_and_a_target_changes_no_key():
    assert changed(shared(target="vllm")) == set()
    before, now = unedited(), after(shared(alternatives=2))
    added = {step for step in now if step not in before}
    assert rules(added) == {*SOLVED}
    assert {name for step in added for name in step if name.startswith("shared")} == {"shared-a1", "shared-a2"}
    assert {step for step in before if step in now and before[step] != now[step]} == all_of("allocate_bits")


def test_another_candidate_measures_the_schemes_and_no_sensitivity():
    def edit(config: dict[str, Any]) -> None:
        config["formats"]["shared"]["allocate"]["schemes"] = ["w4a16", "w8a16", "w4a16 group-32"]

    before, now = unedited(), after(edit)
    renewed = {step for step in before if before[step] != now.get(step)}
    assert rules(renewed) == {"measure_schemes", "allocate_bits", *SOLVED}
