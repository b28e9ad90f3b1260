"""Corpora and tasks while the workflow is planned: what a file shows is said before any job, in
seconds and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plan_cases
from input_cases import edit_json, tiny, write_lines
from quantgrid.config import validation
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT

CHOICES = {"query": "a", "choices": ["b", "c"], "gold": 0}


def content(folder: Path, **corpus: Any) -> dict[str, Any]:
    """A config of the tiny model in ``folder`` with a corpus ``own`` that perplexity is measured
    on, and a task ``mine``."""
    path = write_lines(folder / "own.jsonl", *({"text": f"Some words {number}."} for number in range(20)))
    made = plan_cases.content()
    made["models"]["tiny"]["path"] = str(tiny(folder / "model"))
    made["corpora"]["own"] = {"source": "local", "path": str(path), "window": 16, **corpus}
    made["tasks"]["mine"] = {"source": "local", "path": str(write_lines(folder / "mine.jsonl", CHOICES))}
    made["studies"]["formats"]["evaluate"] = {"perplexity": ["own"], "tasks": ["mine"]}
    made["studies"]["formats"].pop("figure")
    return made


def refusal(made: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        validation.check(made)
    return str(refused.value).splitlines()


def test_good_inputs_are_planned(tmp_path: Path):
    validation.check(content(tmp_path))


CASES: dict[str, tuple[Callable[[dict[str, Any], Path], Any], str]] = {
    "null": (
        lambda made, folder: write_lines(folder / "own.jsonl", {"text": "x"}, {"text": None}),
        "own.jsonl:2: 'text' holds null, not a text",
    ),
    "field": (
        lambda made, folder: made["corpora"]["own"].update(field="body"),
        "own.jsonl:1: no field 'body' (has: text)",
    ),
    "file kind": (
        lambda made, folder: made["corpora"]["own"].update(path=str(folder / "model" / "model.safetensors")),
        "corpora.own.format: unknown format '.safetensors'",
    ),
    "gone": (
        lambda made, folder: made["corpora"]["own"].update(path="/none.csv"),
        "corpora.own.path: /none.csv: no such file",
    ),
    "window": (
        lambda made, folder: made["corpora"]["own"].update(window=513),
        "corpora.own.window: windows of 513 tokens are longer than the 512 positions of model 'tiny'",
    ),
    "calibration's window": (
        lambda made, folder: made["corpora"]["text"].update(window=4096),
        "corpora.text.window: windows of 4096 tokens are longer than the 512 positions of model 'tiny'",
    ),
    "render without template": (
        lambda made, folder: made["corpora"]["own"].update(
            path=str(write_lines(folder / "chat.jsonl", {"m": [{"role": "user", "content": "x"}]})),
            field="m",
            render="chat_template",
        ),
        "corpora.own.render: the tokenizer of model 'tiny' has no chat template",
    ),
    "items": (
        lambda made, folder: made["tasks"]["cloze"].update(items=100000),
        "tasks.cloze.items: 100000; accepted for kind 'cloze' are 1 to",
    ),
    "render of plain text": (
        lambda made, folder: made["corpora"]["docs"].update(render="chat_template"),
        "corpora.docs.render: source: builtin holds plain texts; leave it out",
    ),
    "task layout": (
        lambda made, folder: write_lines(folder / "mine.jsonl", CHOICES, {"question": "x"}),
        "mine.jsonl:2: none of the layouts",
    ),
    "last line of a task": (
        lambda made, folder: write_lines(folder / "mine.jsonl", *[CHOICES] * 500, {**CHOICES, "gold": 5}),
        "mine.jsonl:501: 'gold' (5) is not an index from 0",
    ),
    "task gone": (
        lambda made, folder: made["tasks"]["mine"].update(path="~/none.jsonl"),
        "tasks.mine.path: ~/none.jsonl: no such file",
    ),
    "delimiter of another source": (
        lambda made, folder: made["tasks"]["cloze"].update(delimiter=""),
        "tasks.cloze.delimiter: only tasks with",
    ),
    "incomplete model": (
        lambda made, folder: edit_json(folder / "model" / "config.json", tie_word_embeddings=False),
        "no tensor 'lm_head.weight'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_shows_is_said_while_planning(tmp_path: Path, name: str):
    spoil, message = CASES[name]
    made = content(tmp_path)
    spoil(made, tmp_path)
    (line,) = refusal(made)
    assert message in line


def test_all_mistakes_of_inputs_are_in_one_message(tmp_path: Path):
    made = content(tmp_path)
    write_lines(tmp_path / "own.jsonl", {"text": 1})
    write_lines(tmp_path / "mine.jsonl", {**CHOICES, "choices": ["x"]})
    first, *lines = refusal(made)
    assert first == "2 mistakes in the config:" and "own.jsonl:1" in lines[0] and "mine.jsonl:1" in lines[1]


def test_longer_windows_are_allowed_where_that_is_said(tmp_path: Path):
    validation.check(content(tmp_path, window=513, beyond_positions=True))


def test_a_declared_shape_may_name_positions(tmp_path: Path):
    made = content(tmp_path)
    made["studies"]["formats"]["models"] = ["big"]
    made["corpora"]["own"]["window"] = 2048
    validation.check(made)  # not known before the model is there
    made["models"]["big"]["shape"]["positions"] = 1024
    (line,) = refusal(made)
    assert line.startswith(
        "corpora.own.window: windows of 2048 tokens are longer than the 1024 positions of model 'big'"
    )


def test_planning_large_inputs_is_quick_and_needs_no_torch(tmp_path: Path):
    made = content(tmp_path)
    with open(tmp_path / "own.jsonl", "w") as file:
        for _ in range(200):
            file.write((json.dumps({"text": "word " * 20}) + "\n") * 2000)
    (tmp_path / "config.json").write_text(json.dumps(made))
    code = (
        "import sys, time; from quantgrid.config import validation; begin = time.process_time(); "
        "validation.load(sys.argv[1]);"
        "print(time.process_time() - begin);"
        "assert not {'torch', 'numpy', 'transformers', 'pyarrow', 'sentencepiece'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5
