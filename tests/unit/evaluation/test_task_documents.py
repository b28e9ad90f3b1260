"""Local tasks as files: the strings that reach the model, and what is refused while planning, with
file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from input_cases import write_lines
from quantgrid.evaluation import tasks
from quantgrid.evaluation.task_documents import read_documents
from quantgrid.ground.errors import ConfigError

CHOICES = {"query": "The capital is", "choices": ["Rome", "Oslo"], "gold": 0}
CODE = {"context": "def f():\n", "continuation": "    return 1\n"}
CONTEXTS = {"context_options": ["So Ann", "So Bob"], "continuation": "won.", "gold": 1}


def requests(tmp_path: Path, document: dict[str, Any], **entry: Any) -> list[tuple[str, str]]:
    """(context, answer) of every request that lm-eval makes of a task with one document."""
    path = write_lines(tmp_path / "t.jsonl", document)
    task = tasks.build_tasks({"t": {"source": "local", "path": str(path), **entry}})["t"]["t"]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize(
    ("document", "entry", "wanted"),
    [
        (CHOICES, {}, [("The capital is", " Rome"), ("The capital is", " Oslo")]),
        (
            {**CHOICES, "query": "中国的首都是", "choices": ["北京", "上海"]},
            {"delimiter": ""},
            [("中国的首都是", "北京"), ("中国的首都是", "上海")],
        ),
        (CHOICES, {"delimiter": "\n"}, [("The capital is", "\nRome"), ("The capital is", "\nOslo")]),
        (
            CHOICES,
            {"delimiter": "\nAnswer: "},
            [("The capital is\nAnswer:", " Rome"), ("The capital is\nAnswer:", " Oslo")],
        ),
        (CHOICES, {"delimiter": ": \n  "}, [("The capital is:", " \n  Rome"), ("The capital is:", " \n  Oslo")]),
        (
            {**CHOICES, "query": "  x = \n", "choices": ["  1\n", "\t2"]},
            {"delimiter": ""},
            [("  x = \n", "  1\n"), ("  x = \n", "\t2")],
        ),
        (
            {**CHOICES, "query": "  x =", "choices": [" 1 ", "2"]},
            {"whitespace": "lm-eval"},
            [("  x =", " 1"), ("  x =", " 2")],
        ),
        (
            {**CHOICES, "query": "{{gold}} [0]", "choices": ["1", "[2]"]},
            {},
            [("{{gold}} [0]", " 1"), ("{{gold}} [0]", " [2]")],
        ),
        ({**CHOICES, "query": "7", "choices": ["7", "8"]}, {}, [("7", " 7"), ("7", " 8")]),
        (CODE, {}, [("def f():\n", "    return 1\n")]),
        ({"context": "Over the", "continuation": " sea"}, {}, [("Over the", " sea")]),
        ({"context": "Over the", "continuation": "sea"}, {"delimiter": " "}, [("Over the", " sea")]),
        ({"context": "Over the", "continuation": "sea"}, {"delimiter": " >> "}, [("Over the >>", " sea")]),
        ({"context": "Over the ", "continuation": " sea\n"}, {"whitespace": "lm-eval"}, [("Over the", " sea")]),
        ({"context": "", "continuation": "sea"}, {}, [("", "sea")]),
        (CONTEXTS, {}, [("So Ann", " won."), ("So Bob", " won.")]),
        (
            {**CONTEXTS, "context_options": ["Ann ", "B\n"], "continuation": " won.\n"},
            {"delimiter": ""},
            [("Ann ", " won.\n"), ("B\n", " won.\n")],
        ),
        ({**CONTEXTS, "continuation": " won. "}, {"whitespace": "lm-eval"}, [("So Ann", " won."), ("So Bob", " won.")]),
    ],
)
def test_the_strings_that_reach_the_model(
    tmp_path: Path, document: dict[str, Any], entry: dict[str, Any], wanted: list[tuple[str, str]]
):
    assert requests(tmp_path, document, **entry) == wanted


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "t.parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str):
    lines = [CHOICES, {**CHOICES, "gold": 1, "id": "more"}]
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / name)
    elif name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(lines, indent=1))
    else:
        write_lines(tmp_path / name, *lines)
    assert read_documents({"path": str(tmp_path / name)}) == [CHOICES, {**CHOICES, "gold": 1}]


def line(**changes: Any) -> str:
    return json.dumps({**CHOICES, **changes})


BAD = {
    "wrong layout": (
        '{"question": "2+2?", "options": ["3", "4"], "answer": 1}',
        "none of the layouts {choices, gold, query}; {context, continuation}; {context_options, continuation, gold}; "
        "the line has the "
        "fields question, options, answer",
    ),
    "two layouts": (json.dumps({**CHOICES, **CODE}), "several of the layouts"),
    "no object": ("[1]", "none of the layouts .* the line is a list"),
    "null": (line(query=None), "'query' holds null, not a text"),
    "number": (line(query=3), "'query' holds a number, not a text"),
    "choices no list": (line(choices="ab"), "'choices' holds a text, not a list of texts"),
    "choice a number": (line(choices=["3", 4]), "'choices.1' holds a number, not a text"),
    "empty choice": (line(choices=["a", ""]), "'choices' is empty or has an empty text"),
    "blank choice": (line(choices=["a", " "]), "'choices' is empty or has an empty text"),
    "no choice": (line(choices=[]), "'choices' is empty or has an empty text"),
    "one choice": (line(choices=["a"]), "'choices' holds one text, so every answer is correct"),
    "twice": (line(choices=["a", "b", "a"]), "'choices' holds 'a' twice; duplicate_choices: true"),
    "gold beyond": (line(gold=2), r"'gold' \(2\) is not an index from 0 into 'choices', which holds 2 texts"),
    "gold below": (line(gold=-1), r"'gold' \(-1\) is not an index from 0"),
    "gold a letter": (line(gold="A"), r"'gold' \('A'\) is not an index from 0"),
    "gold a truth value": (line(gold=True), r"'gold' \(True\) is not an index from 0"),
    "gold with a point": (line(gold=1.0), r"'gold' \(1.0\) is not an index from 0"),
    "empty continuation": (json.dumps({**CODE, "continuation": ""}), "'continuation' is empty"),
    "blank context": (json.dumps({**CODE, "context": " \n"}), "has only whitespace"),
    "no continuation": (json.dumps({"context": "a"}), "none of the layouts"),
    "options alike": (json.dumps({**CONTEXTS, "context_options": ["a", "a"]}), "'context_options' holds 'a' twice"),
    "surrogate": ('{"context": "\\udc00", "continuation": "b"}', "'context' holds half of a surrogate pair"),
    "no JSON": ("{", "not a JSON line"),
    "key twice": ('{"context": "a", "context": "b", "continuation": "c"}', "the key 'context' occurs twice"),
    "Latin-1": (b'{"context": "\xe4", "continuation": "b"}', "not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_lines_that_cannot_be_scored_are_refused(tmp_path: Path, name: str):
    data, message = BAD[name]
    first = (
        CODE
        if "context" in str(data) and "options" not in str(data)
        else CONTEXTS
        if "context_options" in str(data)
        else CHOICES
    )
    data = data if isinstance(data, bytes) else data.encode()
    (tmp_path / "t.jsonl").write_bytes(json.dumps(first).encode() + b"\n\n" + data + b"\n")
    with pytest.raises(ConfigError, match=rf"t\.jsonl:3: .*{message}") as refused:
        read_documents({"path": str(tmp_path / "t.jsonl")}, "tasks.t")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"metric": "f1"}, r"tasks\.t\.metric: unknown metric 'f1'.*Accepted: acc, acc_norm"),
        ({"shots": 5}, r"tasks\.t\.shots: 5; examples and filters are accepted for source: lm_eval"),
        ({"filter": "x"}, r"tasks\.t\.filter: 'x'"),
        ({"whitespace": "strip"}, r"tasks\.t\.whitespace: unknown convention 'strip'.*Accepted: exact, lm-eval"),
        (
            {"whitespace": "lm-eval", "delimiter": "\n"},
            r"tasks\.t\.delimiter: '\\n'; whitespace: lm-eval always puts one space .*remove delimiter",
        ),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, entry: dict[str, Any], message: str):
    path = write_lines(tmp_path / "t.jsonl", CHOICES)
    with pytest.raises(ConfigError, match=message):
        read_documents({"path": str(path), **entry}, "tasks.t")


def test_duplicates_are_scored_where_that_is_asked_for(tmp_path: Path):
    path = write_lines(tmp_path / "t.jsonl", {**CHOICES, "choices": ["a", "a"]})
    assert read_documents({"path": str(path), "duplicate_choices": True})[0]["choices"] == ["a", "a"]
    path = write_lines(tmp_path / "t.jsonl", {**CHOICES, "choices": ["a", "a "]})
    assert read_documents({"path": str(path)})[0]["choices"] == ["a", "a "]
    with pytest.raises(ConfigError, match="holds 'a' twice"):
        read_documents({"path": str(path), "whitespace": "lm-eval"})
    with pytest.raises(ConfigError, match="accepted are JSON lines"):
        read_documents({"path": str(write_lines(tmp_path / "t.csv", CHOICES))})
