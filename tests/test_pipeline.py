"""Keys and paths: an edit of the config changes the keys of exactly those steps that depend on it; specifications; what the rules look up."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plan_cases import TINY, content, plan
from quantgrid.config import check
from quantgrid.errors import ConfigError
from quantgrid.grid import AXES, Cell, expand_studies
from quantgrid.pipeline import Plan
from quantgrid.provenance import canonical, digest
from quantgrid.steps import COMPUTING, OUTPUTS

ROOT = Path(__file__).resolve().parents[1]
Edit = Callable[[dict[str, Any]], Any]
Steps = dict[tuple[str, ...], str]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # the path of the tiny model is relative


@cache
def unedited() -> Steps:
    """The steps of :func:`content`."""
    return steps(content())


def steps(config: dict[str, Any]) -> Steps:
    """(rule, wildcards of its path in their order) -> key, of every step."""
    found: Steps = {}
    for rule, known in plan(config).steps.items():
        names = [name for name in re.findall(r"{(\w+)}", next(iter(OUTPUTS[rule].values()))) if name != "key"]
        found |= {(rule, *(step.wildcards[name] for name in names)): step.key for step in known.values()}
    return found


def after(edit: Edit) -> Steps:
    config = content()
    edit(config)
    return steps(config)


def changed(edit: Edit) -> set[tuple[str, ...]]:
    """The steps whose keys an edit changes; it neither adds nor removes one."""
    before, now = unedited(), after(edit)
    assert before.keys() == now.keys()
    return {step for step in before if before[step] != now[step]}


def rules(found: Iterable[tuple[str, ...]]) -> set[str]:
    return {rule for rule, *_ in found}


def all_of(*wanted: str) -> set[tuple[str, ...]]:
    return {step for step in unedited() if step[0] in wanted}


def naming(name: str) -> set[tuple[str, ...]]:
    """All steps with ``name`` in their path."""
    return {step for step in unedited() if name in step[1:]}


EVALUATIONS = ("evaluate_perplexity", "evaluate_tasks")


# -- what an edit changes -----------------------------------------------------------------------------------------------------------------


def test_every_rule_has_steps_and_every_path_one_key():
    found = unedited()
    assert rules(found) == set(OUTPUTS) and len(set(found.values())) == len(found)
    assert all(re.fullmatch("[0-9a-f]{10}", key) for key in found.values())


@pytest.mark.parametrize(("edit", "name"), [
    (lambda c: c["transforms"]["smooth"].update(alpha=0.6), "smooth"),
    (lambda c: c["transforms"]["smooth"].update(sites=["mlp_input"]), "smooth"),
    (lambda c: c["transforms"]["turn"].update(seed=5), "turn"),
    (lambda c: c["mitigations"]["lr8"].update(rank=16), "lr8"),
    (lambda c: c["mitigations"]["lr8"].update(metric="qera_exact"), "lr8"),
    (lambda c: c["mitigations"]["solved"].update(damping=0.02), "solved"),
    (lambda c: c["mitigations"]["tuned"].update(steps=4), "tuned"),
    (lambda c: c["formats"]["int4-mse"]["weight"].update(mse_norm=2.0), "int4-mse"),
    (lambda c: c["formats"]["int4-mse"].update(activation=None), "int4-mse"),
])
def test_an_option_changes_the_steps_of_its_entry_and_no_other(edit, name):
    found = changed(edit)
    assert found == naming(name) and {"train_model" if name == "tuned" else "quantize_model", "evaluate_perplexity"} <= rules(found)
    assert ("fit_transform" in rules(found)) == (name in ("smooth", "turn"))


def test_another_calibration_changes_the_steps_of_its_entry():
    before, now = unedited(), after(lambda config: config["mitigations"]["solved"].update(calibration="default"))
    assert {step for step in now if now[step] != before[step]} == naming("solved")
    assert before.keys() - now.keys() == {("calibrate_model", "tiny", "other"), ("tokenize_corpus", "tiny", "short")}


def test_a_method_in_the_place_of_another_changes_the_steps_of_its_entry():
    def edit(config: dict[str, Any]) -> None:
        config["mitigations"]["lr8"] = {"method": "gptq_low_rank", "rank": 8}
    assert changed(edit) == naming("lr8")


@pytest.mark.parametrize("edit", [
    lambda c: c["transforms"]["smooth"].update(alpha=0.5, sites=["attention_input", "mlp_input"], calibration="default"),
    lambda c: c["mitigations"]["solved"].update(block_size=128, activation_order=False),
    lambda c: c["transforms"]["turn"].update(seed=3),
    lambda c: c["calibrations"]["default"].update(samples=256, skip_first=0),
    lambda c: c["formats"]["int4-mse"].update(activation={}),
    lambda c: c["formats"]["int4-mse"]["weight"].update(clip_ratio=1.0),
    lambda c: c.update(threads={"calibrate_model": 1}),
    lambda c: c.update(threads=1, keep_checkpoints=True, evaluation={"batch_size": 8}),
    lambda c: c["evaluate"].update(tasks=[]),
])
def test_a_default_that_is_written_out_changes_no_key(edit):
    assert changed(edit) == set()


@pytest.mark.parametrize("edit", [
    lambda c: c["studies"]["formats"].update(title="Another", description="Text", paper="Table I"),
    lambda c: c["studies"]["formats"].update(table={"rows": ["format"], "metrics": ["kl_divergence"]}),
    lambda c: c["studies"]["formats"].update(figure={"kind": "bars", "x": "format", "dataset": "more", "scale": "linear"}),
    lambda c: c["report"].update(title="Another"),
    *(lambda c, at=at: c[at[0]][at[1]].update(note="a note") for at in (
        ("models", "tiny"), ("corpora", "docs"), ("corpora", "text"), ("transforms", "smooth"), ("mitigations", "lr8"), ("formats", "int4-mse"),
        ("tasks", "cloze"))),
])
def test_presentation_and_notes_change_no_key(edit):
    assert changed(edit) == set()


def test_the_seed_changes_all_that_draws_and_what_reads_it_but_not_the_model():
    found = changed(lambda config: config.update(seed=4))
    assert rules(found) == set(OUTPUTS) - {"fetch_model"}
    kept = ("none", "rotation-s0", "rotation-s1")  # seeds of their own, or none
    assert all_of("fit_transform") - found == {("fit_transform", "tiny", name, "any") for name in kept}
    assert all_of("quantize_model") - found == {("quantize_model", "tiny", name, "none", "-", "bf16") for name in kept}


def test_the_window_of_a_corpus_changes_what_reads_that_corpus():
    evaluated = changed(lambda config: config["corpora"]["more"].update(window=48))
    assert evaluated == naming("more") and rules(evaluated) == {"tokenize_corpus", "evaluate_reference", "evaluate_perplexity"}
    calibrated = changed(lambda config: config["corpora"]["short"].update(window=48))
    assert calibrated == {("tokenize_corpus", "tiny", "short"), ("calibrate_model", "tiny", "other")} | naming("solved")


def test_tokens_that_a_calibration_leaves_out_change_what_is_calibrated_on_it():
    assert changed(lambda config: config["calibrations"]["other"].update(skip_first=1)) == {("calibrate_model", "tiny", "other")} | naming("solved")


def test_the_corpus_of_calibration_changes_all_that_is_calibrated():
    found = changed(lambda config: config["calibrations"]["default"].update(samples=64))
    assert all_of("calibrate_model") & found == {("calibrate_model", "tiny", "default")}
    assert all_of("fit_transform") & found == {("fit_transform", "tiny", "smooth", "any")}
    assert all_of("describe_transform") <= found
    uncalibrated = {step for step in all_of("quantize_model") if step[2] != "smooth" and step[3] in ("none", "solved")}
    assert all_of("quantize_model") - found == uncalibrated


def test_a_task_list_changes_its_tasks_only():
    assert changed(lambda config: config["studies"]["formats"]["evaluate"].update(tasks=["cloze"])) == all_of("evaluate_tasks")
    assert changed(lambda config: config["tasks"]["true"].update(items=4)) == all_of("evaluate_tasks")
    assert changed(lambda config: config["studies"]["formats"]["evaluate"].update(tasks=["true", "cloze"])) == set()


@pytest.mark.parametrize("edit", [lambda c: c.update(evaluation={"batch_size": 4})])
def test_the_batch_size_changes_evaluations_only(edit):
    assert changed(edit) == all_of(*EVALUATIONS, "evaluate_reference")


@pytest.mark.parametrize("edit", [lambda c: c.update(threads=2), lambda c: c["compute"].update(dtype="float64")])
def test_the_arithmetic_changes_all_that_computes(edit):
    assert rules(changed(edit)) == set(OUTPUTS) - {"fetch_model", "tokenize_corpus"}


@pytest.mark.parametrize("rule", COMPUTING)
@pytest.mark.parametrize("default", [1, 2])
def test_threads_of_a_rule_are_its_own(rule, default):
    found = plan({**content(), "threads": {"default": default, rule: 3}})
    told = {name: {step.spec["compute"]["threads"] for step in steps.values()} for name, steps in found.steps.items() if name in COMPUTING}
    assert told == {name: {3 if name == rule else default} for name in COMPUTING}
    assert {name: found.threads(name) for name in COMPUTING} == {name: 3 if name == rule else default for name in COMPUTING}


def test_threads_of_a_rule_change_its_steps_and_what_reads_them():
    assert rules(changed(lambda c: c.update(threads={"evaluate_perplexity": 2}))) == {"evaluate_perplexity"}
    assert rules(changed(lambda c: c.update(threads={"train_model": 2}))) == {"train_model", *EVALUATIONS, "measure_depth"} & rules(unedited())


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


# -- what an addition leaves --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("edit", "new"), [
    (lambda c: c["studies"].update(third={**c["studies"]["formats"], "formats": ["int8"], "title": "Third"}), "int8"),
    (lambda c: c["studies"]["formats"].update(models=["tiny", "big"]), "big"),
    (lambda c: c["studies"]["formats"]["mitigations"].append("gptq"), "gptq"),
    (lambda c: (c["corpora"].update(late={"source": "builtin", "part": "evaluation", "window": 16, "windows": 2}),
                c["studies"]["formats"]["evaluate"]["perplexity"].append("late")), "late"),
    (lambda c: c["transforms"]["rotation"]["seeds"].append(2), "rotation-s2"),
])
def test_an_addition_brings_new_steps_and_changes_none(edit, new):
    before, now = unedited(), after(edit)
    assert before.items() <= now.items()
    added = now.keys() - before.keys()
    assert added and all(new in step for step in added)


@pytest.mark.parametrize("edit", [
    lambda c: c["models"].update(third=c["models"]["big"]),
    lambda c: c["corpora"].update(third=c["corpora"]["docs"]),
    lambda c: c["transforms"].update(third={"method": "scaling", "alpha": 0.1}),
    lambda c: c["tasks"].update(third=c["tasks"]["cloze"]),
    lambda c: c["studies"].update(third=dict(c["studies"]["formats"])),
])
def test_an_entry_that_nothing_uses_and_a_study_of_shared_cells_bring_no_step(edit):
    assert after(edit) == unedited()


# -- the same content, the same keys ------------------------------------------------------------------------------------------------------


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
    code = ("import json, sys; from quantgrid.config import check; from quantgrid.pipeline import Plan;"
            "print('\\n'.join(Plan(check(json.loads(sys.argv[1]))).all_evaluations()))")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(content())], capture_output=True, text=True, env={"PYTHONPATH": "scripts"})
    assert done.stdout.split() == plan(content()).all_evaluations(), done.stderr


def test_the_results_folder_moves_paths_and_changes_no_key(tmp_path):
    here, there = content(), {**content(), "results_dir": f"{tmp_path}/results/"}
    assert steps(here) == steps(there)
    assert [f"{tmp_path}/{path}" for path in plan(here).all_evaluations()] == plan(there).all_evaluations()


# -- specifications and look-ups ----------------------------------------------------------------------------------------------------------


def test_a_specification_is_canonical_json_without_absolute_paths(tmp_path):
    made = plan({**content(), "results_dir": str(tmp_path / "results")})
    for rule, known in made.steps.items():
        for step in known.values():
            text = made.spec(rule)(step.wildcards)
            assert canonical(json.loads(text)) == text and json.loads(text)["axes"] == step.wildcards
            assert str(tmp_path) not in text and str(ROOT) not in text and '"/' not in text


def test_the_key_is_the_digest_of_the_specification_and_of_what_is_read():
    for rule, known in plan(content()).steps.items():
        for step in known.values():
            assert step.key == digest({key: value for key, value in step.spec.items() if key != "axes"}), rule
            assert step.spec["upstream"].keys() == step.inputs.keys() and {"code", "versions"} <= step.spec.keys()
            for name, path in step.inputs.items():
                assert step.spec["upstream"][name].split("/")[0] in path


def test_inputs_of_a_step_are_outputs_of_others():
    made = plan(content())
    outputs = {path for known in made.steps.values() for step in known.values() for path in step.outputs.values()}
    assert {path for known in made.steps.values() for step in known.values() for path in step.inputs.values()} <= outputs
    assert set(made.all_evaluations()) <= outputs


def test_rules_look_a_step_up_by_its_wildcards():
    made = plan(content())
    cell = Cell("tiny", "none", "none", "-", "bf16")
    step = made.quantize_model(cell)
    assert made.inputs("quantize_model")(step.wildcards) == {**step.inputs, "statistics": [], "windows": [], "digests": step.digests}
    assert step.digests == (made.fetch_model("tiny").digest, made.fit_transform(cell).digest)
    assert step.digest == made.digest("quantize_model").format(**step.wildcards)
    assert step.outputs["error"] == made.pattern("quantize_model", "error").format(**step.wildcards)
    assert made.inputs("quantize_model")(step.wildcards)["windows"] == []
    rounded = made.quantize_model(Cell("tiny", "none", "rtn", "channel", "int4"))
    assert made.inputs("quantize_model")(rounded.wildcards)["statistics"].startswith("results/calibration/tiny/default/")


def test_a_mitigation_that_searches_the_ranges_of_weights_changes_the_weight_scheme_alone():
    """Not the scheme that transforms are fitted to, and no range that the format states."""
    def schemes(format: str, **formats: Any) -> dict[str, dict[str, Any]]:
        config = content()
        config["mitigations"] |= {"plain": {"method": "gptq"}, "ranges": {"method": "gptq", "weight_range": "mse"}}
        config["formats"] |= formats
        config["report"]["distributions"] = []
        config["studies"]["methods"] |= {"transforms": ["none"], "mitigations": ["plain", "ranges"], "formats": [format], "exclude": []}
        made = plan(config)
        return {name: made.quantize_model(Cell("tiny", "none", name, "channel", format)).spec for name in ("plain", "ranges")}

    found = schemes("int4")
    assert found["plain"]["mitigation"] == found["ranges"]["mitigation"] and found["plain"]["code"] == found["ranges"]["code"]
    plain, ranges = (found[name]["schemes"] for name in ("plain", "ranges"))
    assert ranges == {**plain, "weight": {**plain["weight"], "range": "mse"}} and plain["weight"]["range"] == "minmax"
    stated = schemes("tails", tails={"preset": "int4", "weight": {"range": "percentile"}})
    assert stated["plain"]["schemes"] == stated["ranges"]["schemes"]
    with pytest.raises(ConfigError, match="mitigations.ranges on format 'kmeans4': weight_range 'mse': element 'kmeans4'"):
        schemes("kmeans4")


def test_a_sequential_mitigation_reads_the_windows_that_it_is_calibrated_on():
    """Beside everything that a cached one reads; its function is told nothing of it, and no cached cell depends on the module."""
    def edit(config: dict[str, Any]) -> None:
        config["mitigations"] |= {"in-turn": {"method": "gptq", "propagation": "sequential", "quantized_activations": True},
                                  "paired": {"method": "gptq_low_rank", "base": "gptaq", "propagation": "sequential", "calibration": "skipping"},
                                  "cached": {"method": "gptq"}}
        config["calibrations"]["skipping"] = {"corpus": "text", "skip_first": 2}
        config["studies"]["methods"]["mitigations"] = ["in-turn", "paired", "cached"]

    config = content()
    edit(config)
    made = plan(config)
    in_turn, paired, cached = (made.quantize_model(Cell("tiny", "none", name, "channel", "int4")) for name in ("in-turn", "paired", "cached"))
    assert in_turn.inputs.keys() == cached.inputs.keys() | {"windows"} and in_turn.inputs["windows"].startswith("results/corpora/tiny/")
    windows = made.calibrate_model("tiny", "default").inputs["windows"]
    assert in_turn.inputs["windows"] == paired.inputs["windows"] == windows
    assert in_turn.spec["propagation"] == {"module": "propagation", "quantized_activations": True, "paired": False, "skip_first": 0}
    assert paired.spec["propagation"] == {"module": "propagation", "quantized_activations": False, "paired": True, "skip_first": 2}
    assert in_turn.spec["mitigation"] == cached.spec["mitigation"] and "propagation" not in cached.spec
    assert in_turn.spec["code"] != cached.spec["code"] and "transformers" in in_turn.spec["versions"]


def test_two_names_for_the_same_options_stay_two_cells():
    """Their keys are equal, so the rest of the path has to tell them apart: each job gets its own axes and reads its own files."""
    def edit(config: dict[str, Any]) -> None:
        config["transforms"]["twin"] = dict(config["transforms"]["smooth"])
        config["studies"]["methods"]["transforms"] = ["smooth", "twin"]

    config = {**content(), "report": {}}
    edit(config)
    made = plan(config)
    twins = [made.quantize_model(Cell("tiny", name, "rtn", "channel", "int4")) for name in ("smooth", "twin")]
    assert twins[0].key == twins[1].key and twins[0].outputs["error"] != twins[1].outputs["error"]
    for step, name in zip(twins, ("smooth", "twin")):
        assert json.loads(made.spec("quantize_model")(step.wildcards))["axes"]["transform"] == name
        assert f"/{name}/" in made.inputs("quantize_model")(step.wildcards)["transform"]
        as_snakemake = SimpleNamespace(**step.wildcards, items=step.wildcards.items)
        assert made.inputs("quantize_model")(as_snakemake) == made.inputs("quantize_model")(step.wildcards)


def test_a_learned_transform_is_fitted_to_the_scheme_of_its_cell(monkeypatch):
    from quantgrid import registry

    method = registry.TRANSFORMS["scaling"]
    monkeypatch.setitem(registry.TRANSFORMS, "scaling", registry.Method(method.module, "", method.options, calibrated=True, fitted_to_scheme=True))
    config = content()
    config["studies"]["formats"].update(transforms=["smooth"])
    found = [step for step in steps(config) if step[0] == "fit_transform" and step[2] == "smooth"]
    assert sorted(target for *_, target in found) == ["bf16--", "int4-channel", "int4-mse-channel"]


def test_what_a_transform_reads_depends_on_its_options():
    """A searched scaling is fitted to the cell, a given one is not; principal axes of activations need the statistics, those of weights do not."""
    config = {**content(), "report": {}}
    config["transforms"]["searched"] = {"method": "scaling", "search": True}
    for name, basis in (("klt", "activations"), ("axes", "weights")):
        config["transforms"][name] = {"method": "random_hadamard", "basis": basis}
    config["studies"]["methods"]["transforms"] = ["smooth", "searched", "klt", "axes"]
    made = plan(config)
    found = {name: made.fit_transform(Cell("tiny", name, "rtn", "channel", "int4")) for name in ("smooth", "searched", "klt", "axes")}
    assert {name: (step.wildcards["target"], "schemes" in step.spec, "statistics" in step.inputs) for name, step in found.items()} == {
        "smooth": ("any", False, True), "searched": ("int4-channel", True, True), "klt": ("any", False, True), "axes": ("any", False, False)}


def test_transforms_are_described_on_the_default_calibration_as_fitted_for_a_quantized_cell():
    config = content()
    config["transforms"] |= {"searched": {"method": "awq", "calibration": "other"}}
    config["report"] = {"distributions": ["searched", "rotation"]}
    config["studies"] = {"s": {"models": ["tiny"], "transforms": ["searched", "rotation"], "mitigations": ["rtn"], "granularities": ["channel"],
                               "formats": ["bf16", "int4-mse", "int4"]}}
    plan = Plan(check(config))
    [(model, paths)] = plan.distributions().items()
    assert model == "tiny" and [path.split("/")[3:5] for path in paths] == [["none", "any"], ["searched", "int4-mse-channel"], ["rotation-s0", "any"]]
    steps = {step.wildcards["transform"]: step for step in plan.steps["describe_transform"].values()}
    assert set(steps) == {"none", "searched", "rotation-s0"}
    assert all("/default/" in step.inputs["statistics"] and step.outputs["distribution"] in paths for step in steps.values())
    assert "/searched/int4-mse-channel/" in steps["searched"].inputs["transform"]
    without = Plan(check({**config, "report": {}}))
    assert without.distributions() == {} and without.all_evaluations() == plan.all_evaluations() and not without.steps["describe_transform"]


def test_evaluations_are_those_that_a_study_asks_for():
    made = plan(content())
    rounded, full = Cell("tiny", "none", "rtn", "channel", "int4"), Cell("tiny", "none", "none", "-", "bf16")
    assert list(made.evaluations("methods")[rounded]) == ["error", "perplexity.docs"]
    assert list(made.evaluations("formats")[rounded]) == ["error", "perplexity.docs", "perplexity.more", "tasks", "depth.docs"]
    assert list(made.evaluations("formats")[full]) == ["error", "perplexity.docs", "perplexity.more", "tasks"]
    shared = made.evaluations("methods")[rounded]
    assert shared.items() <= made.evaluations("formats")[rounded].items()  # one file for both studies
    assert made.all_evaluations() == list(dict.fromkeys(path for study in ("methods", "formats") for path in made.study_inputs(study)))


# -- what collect_study is told -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", ["methods", "formats"])
def test_a_study_is_planned_again_from_its_part_of_the_config(study):
    made = plan(content())
    told = json.loads(made.study_spec(study))
    again = Plan(told["config"])
    assert told["study"] == study and list(told["config"]["studies"]) == [study]
    assert again.evaluations(study) == made.evaluations(study)
    assert list(again.evaluations(study)) == list(made.evaluations(study)) == made.studies[study]


def test_a_study_whose_names_are_all_excluded_somewhere_is_planned_again():
    config = content()
    config["report"] = {}
    config["studies"]["methods"]["exclude"] = [{"transform": ["smooth", "rotation"]}, {"mitigation": "lr8"}, {"format": "int4-mse"}, {"model": "big"}]
    made = plan(config)
    assert Plan(json.loads(made.study_spec("methods"))["config"]).evaluations("methods") == made.evaluations("methods")


def test_the_part_of_a_study_leaves_out_what_its_cells_do_not_use():
    part = json.loads(plan(content()).study_spec("formats"))["config"]
    assert [list(part[axis]) for axis in AXES if axis in part] == [["tiny"], [], ["tuned"], ["int4-mse"]] and "report" not in part
    assert part["studies"]["formats"].keys().isdisjoint({"title", "table", "figure"})


def test_what_is_shown_reaches_the_table_the_figure_or_the_report_alone():
    before, config = plan(content()), content()
    config["studies"]["formats"]["table"] = {"rows": ["format"]}
    now = plan(config)
    assert now.study_spec("formats") == before.study_spec("formats")
    assert now.reporting_spec("tabulate_study", "formats") != before.reporting_spec("tabulate_study", "formats")
    assert now.reporting_spec("plot_study", "formats") == before.reporting_spec("plot_study", "formats")
    assert now.reporting_spec("tabulate_study", "methods") == before.reporting_spec("tabulate_study", "methods")
    told = json.loads(now.reporting_spec("tabulate_study", "formats"))
    assert told["study"] == "formats" and told["title"] == "Formats" and told["table"]["rows"] == ["format"] and "figure" not in told


# -- size ---------------------------------------------------------------------------------------------------------------------------------


def test_ten_thousand_cells_expand_within_seconds():
    config = deepcopy(content())
    config["transforms"] = {f"t{i}": {"method": "scaling", "alpha": i / 40} for i in range(40)}
    config["mitigations"] = {f"m{i}": {"method": "low_rank", "rank": i} for i in range(25)}
    config["formats"] = {f"f{i}": {"preset": "int4", "weight": {"clip_ratio": 1 - i / 20}} for i in range(10)}
    axes = {axis: list(config[axis]) for axis in ("transforms", "mitigations", "formats")}
    config["report"] = {}
    config["studies"] = {"large": {**axes, "models": ["big"], "granularities": ["channel"]}}
    begun = time.process_time()
    checked = check(config)
    assert len(expand_studies(checked)) == 10_001
    expanded = time.process_time()
    assert len(set(Plan(checked).all_evaluations())) == 20_002
    planned = time.process_time()
    assert expanded - begun < 10 and planned - expanded < 40  # seconds of a processor: 0.5 and 4


def test_trainings_read_windows_and_leave_losses():
    config = content()
    config["transforms"] |= {"turned": {"method": "optimized_rotation", "calibration": "other"}, "free": {"method": "data_free_rotation"},
                             "flat": {"method": "flatquant"}}
    config["report"] = {}
    config["studies"] = {"s": {"models": ["tiny"], "transforms": ["turned", "free", "flat", "smooth"], "mitigations": ["rtn", "lr8"],
                               "granularities": ["channel"], "formats": ["int4", "int4-mse"]}}
    plan = Plan(check(config))
    fitted = {cell.transform: plan.fit_transform(cell) for cell in plan.cells}
    assert {name: set(step.inputs) for name, step in fitted.items()} == {
        "none": {"model"}, "smooth": {"model", "statistics"}, "free": {"model"}, "turned": {"model", "windows"},
        "flat": {"model", "statistics", "windows"}}
    assert "/short/" in fitted["turned"].inputs["windows"] and "/text/" in fitted["flat"].inputs["windows"]
    names = [f"tiny, {name}, {scheme}-channel" for name in ("turned", "flat") for scheme in ("int4", "int4-mse")] + ["tiny, free"]
    assert sorted(plan.trainings()) == sorted(names) and all(path.endswith("/losses.csv") for path in plan.trainings().values())
    assert plan.trainings()["tiny, free"] == fitted["free"].outputs["losses"]
    tuned = Plan(check(content()))
    cell = Cell("tiny", "none", "tuned", "channel", "int4")
    step = tuned.quantize_model(cell)
    assert tuned.trainings() == {"tiny, none, tuned, channel, int4": step.outputs["losses"]} and tuned.trains(cell) == "scales"
    assert set(step.inputs) == {"model", "transform", "statistics", "windows"} and step.spec["training"] == "scales" and step.spec["seed"] == 3
    assert set(tuned.evaluate_perplexity(cell, "docs").inputs.values()) >= {step.outputs["checkpoint"], step.outputs["manifest"]}
    assert step.outputs["losses"] not in tuned.all_checkpoints() and step.outputs["checkpoint"] in tuned.all_checkpoints()
