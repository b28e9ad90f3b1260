"""Bad input is refused before any job, in words that name the key, the file or the cell and what
would be accepted; defaults; what only jobs see."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkouts import Checkout
from config_cases import TINY, refusal, valid
from config_content_cases import CONTENT_MISTAKES
from config_schema_cases import SCHEMA_MISTAKES
from in_process import Done, run_script
from quantgrid.config import validation
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.provenance import canonical
from quantgrid.machine.chunks import windows_per_batch
from quantgrid.plan.pipeline import Plan


def test_the_config_that_the_mistakes_are_made_in_is_valid():
    assert (
        len(Plan(validation.check(valid())).all_evaluations()) == 2 * 5
    )  # errors and perplexity of four quantized cells and the baseline


BAD = {**SCHEMA_MISTAKES, **CONTENT_MISTAKES}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_refused_by_name_with_what_is_accepted(mistake):
    edit, expected = BAD[mistake]
    message = refusal(edit)
    assert message.startswith(expected[0]), message
    assert all(part in message for part in expected) and "\n" not in message, message


def test_bad_input_covers_more_cases_than_asked_for():
    assert len(BAD) >= 20


def test_every_mistake_is_named_in_one_message():
    def edit(config: dict[str, Any]) -> None:
        config["transforms"]["smooth"]["alpha"] = 2
        config["formats"]["int4-mse"]["preset"] = "int9"
        config["evaluate"]["perplexity"] = ["dcs"]
        config["studies"]["s"].update(mitigations=["lr9", "rtn", "gptqq"], models=["tyny"])
        config["studies"]["t"] = {"formats": ["int44"]}

    first, *lines = refusal(edit).splitlines()
    assert first == "7 mistakes in the config:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "transforms.smooth.alpha",
        "formats.int4-mse.preset",
        "studies.s.models",
        "studies.s.mitigations",
        "studies.s.mitigations",
        "studies.t.formats",
        "evaluate.perplexity",
    ]
    first, *lines = refusal(
        lambda config: (config.update(sead=1, seed="x"), config["corpora"]["docs"].update(windw=1))
    ).splitlines()
    assert first == "3 mistakes in the config:" and [line.split(":")[0] for line in lines] == [
        "  config",
        "  corpora.docs",
        "  seed",
    ]
    first, *lines = refusal(
        lambda config: config["studies"].update(t={}, u={**config["studies"]["s"], "formats": ["mxfp4"]})
    ).splitlines()
    assert (
        first == "2 mistakes in the config:"
        and "studies.t: the study has no cells" in lines[0]
        and "studies.u: format 'mxfp4'" in lines[1]
    )


@pytest.mark.parametrize("content", [None, [], "models", 3])
def test_what_is_no_mapping_is_refused(content):
    with pytest.raises(ConfigError, match="not a mapping; it holds the keys models, corpora, calibrations, studies"):
        validation.check(content)


def test_an_empty_config_is_told_what_it_needs():
    with pytest.raises(
        ConfigError, match="config: the keys 'models', 'corpora', 'calibrations', 'studies' are missing"
    ):
        validation.check({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "not a readable YAML file"),
        ("- a\n- b", "not a mapping"),
        ("", "not a mapping"),
        (None, "not a readable YAML file .*No such file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{message}") as caught:
        validation.load(path)
    assert "\n" not in str(caught.value)


# -- folders ---------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            "config.json: no such file; a model folder holds config.json",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not a JSON file"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "models.tiny.path: .*holds no weights; expected model.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "models.tiny.path: .*only pickled weights.*save_pretrained",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 5000),
            "model.safetensors: not a complete safetensors file",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "models.tiny.path: .*holds no tokenizer; one of tokenizer.json",
        ),
        (
            lambda folder: edit_json(folder / "config.json", architectures=["XGLMForCausalLM"]),
            r"unknown architecture 'XGLMForCausalLM'; \d+ are supported \(docs/reference/models.md\), "
            "with similar names GlmForCausalLM",
        ),
        (
            lambda folder: edit_json(folder / "config.json", architectures=["Qwen3MoeForCausalLM"]),
            "the key 'num_experts' is missing",
        ),
        (lambda folder: edit_json(folder / "config.json", num_local_experts=8), "LlamaForCausalLM is a dense decoder"),
    ],
)
def test_a_spoilt_model_folder_is_refused_before_any_job(tmp_path, spoil, message):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        validation.check(valid(models={"tiny": {"source": "local", "path": str(folder)}}))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for results in (tmp_path / "file", tmp_path / "file" / "deeper" / "still"):
        message = refusal(lambda config, results=results: config.update(results_dir=str(results)))
        assert message == f"results_dir: '{results}' cannot be written ({tmp_path / 'file'} is not a writable folder)"
    assert validation.check(valid(results_dir=str(tmp_path / "not" / "there")))


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text")
    content = valid(models={"tiny": {"source": "local", "path": "~/model"}})
    content["corpora"]["docs"] = {"source": "local", "path": "~/text.txt", "window": 2}
    assert len(Plan(validation.check(content)).all_evaluations()) == 2 * 5


# -- defaults --------------------------------------------------------------------------------------


def test_with_automatic_batches_corpora_take_the_default():
    checked = validation.check({**valid(), "evaluation": {"batch_size": "auto"}})
    assert checked["evaluation"]["batch_size"] == "auto" and windows_per_batch("auto") == 8


def test_defaults_are_filled_in_and_the_content_stays_as_it_was():
    content = valid()
    before = json.dumps(content)
    checked = validation.check(content)
    assert json.dumps(content) == before and validation.check(content) == checked
    assert (checked["results_dir"], checked["seed"], checked["threads"], checked["keep_checkpoints"]) == (
        "results",
        0,
        {"default": 1},
        False,
    )
    assert checked["compute"] == {"device": "auto", "dtype": "auto", "solver_dtype": "auto"}
    assert checked["evaluation"] == {
        "batch_size": 8,
        "task_limit": None,
        "residual_error_windows": 4,
        "shard_windows": 32,
    }
    settled = {"corpus": "text", "samples": 256, "skip_first": 0, "experts": "routed"}
    assert checked["calibrations"]["default"] == settled
    assert checked["evaluate"] == {"perplexity": ["docs"], "tasks": [], "residual_error": []}
    assert checked["report"] == {"title": "quantgrid", "distributions": []}
    assert checked["studies"]["s"]["table"] == {
        "rows": ["transform"],
        "columns": ["mitigation"],
        "metrics": ["kl_divergence", "perplexity"],
    }
    assert checked["studies"]["s"]["figure"] == {
        "kind": "dots",
        "x": "mitigation",
        "hue": "transform",
        "metric": "kl_divergence",
        "scale": "log",
    }


@pytest.mark.parametrize(("tasks", "metric"), [(["one"], "accuracy"), (["one", "two"], "mean_accuracy")])
def test_a_study_with_tasks_only_shows_their_accuracy(tasks, metric):
    known = {name: {"source": "builtin", "kind": "cloze", "items": 8} for name in tasks}
    study = {**valid()["studies"]["s"], "evaluate": {"perplexity": [], "tasks": tasks}}
    found = validation.check(valid(tasks=known, studies={"s": study}))["studies"]["s"]
    assert found["table"]["metrics"] == [metric]
    assert (found["figure"]["metric"], found["figure"]["scale"]) == (metric, "linear")


@pytest.mark.parametrize(
    ("figure", "x", "hue"),
    [
        ({"x": "transform"}, "transform", None),
        ({"hue": "mitigation"}, "transform", "mitigation"),
        ({"x": "format"}, "format", "transform"),
        ({"facet": "transform"}, "mitigation", None),
        ({"x": "mitigation", "hue": "transform", "facet": "format"}, "mitigation", "transform"),
        ({"x": "format", "hue": "mitigation", "facet": "transform"}, "format", "mitigation"),
    ],
)
def test_defaults_of_a_figure_make_room_for_what_a_study_places(figure, x, hue):
    found = validation.check(valid(studies={"s": {**valid()["studies"]["s"], "figure": figure}}))["studies"]["s"][
        "figure"
    ]
    assert (found["x"], found.get("hue")) == (x, hue) and figure.items() <= found.items()


def test_defaults_of_a_table_make_room_for_what_a_study_places():
    found = validation.check(valid(studies={"s": {**valid()["studies"]["s"], "table": {"rows": ["mitigation"]}}}))[
        "studies"
    ]["s"]["table"]
    assert (found["rows"], found["columns"]) == (["mitigation"], [])


# -- what only a job can know, and the workflow ----------------------------------------------------


def assert_refused(done: Done, *parts: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and all(part in lines[0] for part in parts), done.stderr


def test_a_corpus_too_short_is_refused_by_its_job(tmp_path):
    (tmp_path / "short.txt").write_text("A few words, and then no more.")
    content = valid()
    content["corpora"]["docs"] = {"source": "local", "path": str(tmp_path / "short.txt"), "window": 64, "windows": 3}
    step = Plan(validation.check(content)).tokenize_corpus("tiny", "docs")
    done = run_script(
        "tokenize_corpus",
        "--spec",
        canonical(step.spec),
        "--model",
        str(TINY),
        "--windows",
        str(tmp_path / "out.safetensors"),
    )
    assert_refused(
        done,
        "tokenize_corpus: corpora.docs: its",
        "tokens make 0 windows of 64, but 3 are requested; set windows to at most 0",
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checksum_that_does_not_match_is_refused_by_its_job(tmp_path):
    content = valid(models={"tiny": {"source": "local", "path": str(TINY), "sha256": "0" * 64}})
    step = Plan(validation.check(content)).fetch_model("tiny")
    done = run_script("fetch_model", "--spec", canonical(step.spec), "--folder", str(tmp_path / "out"))
    assert_refused(
        done,
        "fetch_model: models.tiny.sha256: the weights in",
        f"the config says {'0' * 64}; correct the one that is wrong",
    )
    assert not list(tmp_path.iterdir())


def test_the_workflow_prints_the_message_and_no_traceback(tmp_path):
    checkout = Checkout.make(tmp_path / "quantgrid")
    content = checkout.config("smoke")
    content["transforms"]["smoothquant"]["alfa"] = content["transforms"]["smoothquant"].pop("alpha")
    (checkout.folder / "bad.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", "bad.yaml"],
        cwd=checkout.folder,
        capture_output=True,
        text=True,
    )
    output = (done.stdout + done.stderr).strip().splitlines()
    accepted = "alpha, division, points, round_activations, search, sites, statistic"
    assert done.returncode == 1
    assert output == [
        f"quantgrid: transforms.smoothquant: unknown option 'alfa' - did you mean 'alpha'? Accepted: {accepted}"
    ]
    assert not (checkout.folder / content["results_dir"]).exists()
    (checkout.folder / "bad.yaml").write_text("models: [")
    done = run_script("run_workflow", "--configfile", "bad.yaml", folder=checkout.folder)
    assert_refused(done, "quantgrid: bad.yaml: not a readable YAML file")


# -- sets of tasks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("paper", 9), ("spinquant8", 8), ("ostquant9", 9), ("offline", 2)])
def test_a_set_stands_for_its_tasks(name, count):
    found = validation.check(valid(evaluate={"perplexity": ["docs"], "tasks": [name]}))
    assert len(found["evaluate"]["tasks"]) == count and set(found["evaluate"]["tasks"]) <= set(found["tasks"])
    assert all(
        entry["source"] == ("builtin" if name == "offline" else "lm_eval")
        for task, entry in found["tasks"].items()
        if task != "cloze"
    )


def test_a_set_beside_single_tasks_and_own_entries():
    content = valid(evaluate={"perplexity": ["docs"], "tasks": ["cloze", "offline"]})
    found = validation.check(content)
    assert (
        found["evaluate"]["tasks"] == ["cloze", "continuation"] and found["tasks"]["cloze"]["items"] == 8
    )  # the config's own cloze
    content["tasks"]["offline"] = {"source": "builtin", "kind": "cloze", "items": 4}
    assert validation.check(content)["evaluate"]["tasks"] == ["cloze", "offline"]
    content["evaluate"]["tasks"] = ["spinqant8"]
    with pytest.raises(ConfigError, match=r"evaluate\.tasks: unknown task 'spinqant8' - did you mean 'spinquant8'"):
        validation.check(content)


@pytest.mark.slow
def test_names_of_sets_are_tasks_of_lm_eval():
    from lm_eval.tasks import TaskManager

    from quantgrid.config.task_presets import TASK_PRESETS

    used = {
        entry["task"] for tasks in TASK_PRESETS.values() for entry in tasks.values() if entry["source"] == "lm_eval"
    }
    assert used <= set(TaskManager().all_tasks)
