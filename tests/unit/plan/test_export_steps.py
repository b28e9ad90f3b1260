"""Steps of exports: inputs, keys, folders; a plan without exports has none."""

from __future__ import annotations

import json

from plan_cases import EXPORTED, changed, content, plan
from quantgrid.config.cells import Cell, baseline
from quantgrid.plan.pipeline import Plan

CELL = Cell("tiny", *EXPORTED)


def made(**changes) -> Plan:
    return plan({**content(), **changes})


def test_an_export_reads_the_cell_its_model_and_what_its_card_shows():
    found = made()
    [step] = found.steps["export_model"].values()
    quantized = found.quantize_model(CELL)
    assert step.inputs == {
        "model": found.fetch_model("tiny").outputs["folder"],
        "checkpoint": quantized.outputs["checkpoint"],
        "manifest": quantized.outputs["manifest"],
        "windows": found.tokenize_all("tiny", "docs").outputs["windows"],
        "measured": found.merge_shards(CELL, "docs").outputs["result"],
        "baseline": found.merge_shards(baseline("tiny"), "docs").outputs["result"],
    }
    assert found.all_exports() == [f"results/exports/{CELL.path}/compressed-tensors/{step.key}"]
    about = step.spec["about"]
    assert (about["cell"], about["key"], about["corpus"]) == ("/".join(EXPORTED), quantized.key, "docs")
    assert about["windows"] == content()["corpora"]["docs"]["windows"]
    assert about["entry"] == {"source": "local", "path": content()["models"]["tiny"]["path"]}
    assert about["calibration"]["default"]["corpus"] == "text"
    assert about["config"]["corpora"] == {name: content()["corpora"][name] for name in ("text", "docs")}
    assert step.spec["modules"] == {"target": "exports.weights"}


def test_without_perplexity_it_is_checked_on_the_calibration_corpus():
    config = content()
    config["evaluate"] = {"tasks": ["cloze"]}
    shown = {"table": {"metrics": ["accuracy"]}, "figure": {"metric": "accuracy"}}
    config["studies"] = {"methods": {**config["studies"]["methods"], **shown}}
    [step] = plan(config).steps["export_model"].values()
    assert "measured" not in step.inputs and "baseline" not in step.inputs and "/text/" in step.inputs["windows"]
    inputs = plan(config).inputs("export_model")(step.wildcards)
    assert inputs["measured"] == inputs["baseline"] == []


def test_the_record_of_a_local_corpus_has_no_path_of_this_machine(tmp_path):
    config = content()
    (tmp_path / "text.txt").write_text("a word of text " * 4000)
    config["corpora"]["text"] = {"source": "local", "path": str(tmp_path / "text.txt"), "window": 64, "windows": 24}
    [step] = plan(config).steps["export_model"].values()
    assert step.spec["about"]["config"]["corpora"]["text"] == {"source": "local", "window": 64, "windows": 24}


def test_an_edit_of_exports_changes_their_steps_alone():
    def flagged(config):
        config["exports"][0]["name"] = "phone"

    assert {rule for rule, *_ in changed(flagged)} == {"export_model"}
    before, after = made(), made(exports=[])
    assert after.all_exports() == [] and after.steps["export_model"] == {}
    assert after.study_spec("methods") == before.study_spec("methods")
    assert json.loads(before.steps_spec())["config"]["exports"] == content()["exports"]
    assert before.steps_spec() != after.steps_spec()


def test_two_targets_of_one_cell_are_two_steps():
    entry = {"model": "tiny", "cell": "/".join(EXPORTED), "to": ["compressed-tensors"]}
    flagged = {**entry, "name": "other"}
    found = made(exports=[entry, flagged, entry])
    assert len(found.all_exports()) == len(found.steps["export_model"]) == 2
