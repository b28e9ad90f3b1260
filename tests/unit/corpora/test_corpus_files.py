"""Corpora as files: every kind with the right documents, every value that is no text refused with
file, line and type."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from input_cases import write_lines
from quantgrid.corpora import token_windows
from quantgrid.corpora.documents import PLANNED, check_local
from quantgrid.ground.errors import ConfigError

WANTED = ["The first, short text.", 'Zwei\nZeilen: "漢字"', " kept "]


def entry(path: Path, **options: Any) -> dict[str, Any]:
    return {"source": "local", "path": str(path), "window": 8, **options}


def csv_text(newline: str = "\n") -> str:
    cells = ['"' + text.replace('"', '""') + '"' for text in WANTED]
    return newline.join(["id,text", *(f"{number},{cell}" for number, cell in enumerate(cells))]) + newline


def content(name: str) -> bytes:
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(WANTED)]
    made = {"jsonl": "\n".join(lines) + "\n\n", "json": "[\n " + ",\n ".join(lines) + "\n]\n", "csv": csv_text()}
    data = made[name.removesuffix(".gz").rpartition(".")[2]].encode()
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str, mark: bytes):
    data = content(name)
    (tmp_path / name).write_bytes(data if name.endswith(".gz") else mark + data)
    assert token_windows.read(entry(tmp_path / name)) == WANTED
    check_local(entry(tmp_path / name), "c")


def test_parquet_gives_them_too(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {"text": pyarrow.array(WANTED).dictionary_encode(), "id": [1, 2, 3], "more": [None, "a", "b"]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert token_windows.read(entry(tmp_path / "a.parquet")) == WANTED
    for field, message in (
        ("id", "row 1: 'id' holds a number, not a text"),
        ("more", "row 1: 'more' holds null, not a text; skip_null"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_local(entry(tmp_path / "a.parquet", field=field), "c")
    with pytest.raises(ConfigError, match=r"no column 'body' \(has: text, id, more\)"):
        check_local(entry(tmp_path / "a.parquet", field="body"), "c")


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfWords.\r\n")
    assert token_windows.read(entry(tmp_path / "a.txt")) == ["Words.\r\n"]


def test_arrays_are_read_across_chunks(tmp_path: Path):
    texts = [f"{number} " + "Long text. " * (number * 40) for number in range(60)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=2))
    assert token_windows.read(entry(tmp_path / "a.json")) == texts


BAD = {
    "null": (
        "a.jsonl",
        '{"text": "x"}\n{"text": null}\n',
        r"a\.jsonl:2: 'text' holds null, not a text; skip_null: true leaves such records out",
    ),
    "number": ("a.jsonl", '{"text": 1}', r"a\.jsonl:1: 'text' holds a number, not a text"),
    "truth": ("a.jsonl", '{"text": true}', "holds a truth value, not a text"),
    "list": ("a.jsonl", '{"text": ["x"]}', r"holds a list, not a text; render: chat_template makes text of messages"),
    "object": ("a.jsonl", '\n\n{"text": {"a": 1}}', r"a\.jsonl:3: 'text' holds an object, not a text"),
    "line is text": ("a.jsonl", '"x"', r"a\.jsonl:1: a text, not an object with a field 'text'"),
    "key twice": ("a.jsonl", '{"text": "x", "text": "y"}', r"a\.jsonl:1: .*the key 'text' occurs twice"),
    "deep": ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not a JSON line"),
    "digits": ("a.jsonl", '{"text": "x", "n": ' + "1" * 5000 + "}", r"a\.jsonl:1: not a JSON line"),
    "surrogate": ("a.jsonl", '{"text": "\\ud800"}', r"a\.jsonl:1: 'text' holds half of a surrogate pair"),
    "nul": ("a.jsonl", '{"text": "a\\u0000"}', "a NUL character"),
    "latin": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', r"a\.jsonl:2: not UTF-8 text"),
    "UTF-16": ("a.txt", "words".encode("utf-16"), "UTF-16 text, by its byte order mark; save it as UTF-8"),
    "UTF-16 without mark": ("a.txt", "words".encode("utf-16-le"), "a NUL character"),
    "element": ("a.json", '[\n {"text": "x"},\n {"text": 3}\n]', r"a\.json:3: 'text' holds a number"),
    "array of texts": ("a.json", '["x"]', r"a\.json:1: a text, not an object"),
    "array cut": ("a.json", '[{"text": "x"},', r"a\.json:1: not an element of a JSON array"),
    "array without comma": (
        "a.json",
        '[{"text": "x"} {"text": "y"}]',
        "expected ',' or ']' in a JSON array, found '{'",
    ),
    "array and more": ("a.json", '[{"text": "x"}] 1', "unexpected content after the end"),
    "object file": ("a.json", '{\n "text": "x"\n}', r"a\.json:1: not a JSON line"),
    "cells": (
        "a.csv",
        "id,text\n1,a, b\n",
        r"a\.csv:2: 3 cells, but the header has 2; put a text with commas in double quotes",
    ),
    "open quote": ("a.csv", 'id,text\n1,"a\n', r"a\.csv:2: not CSV"),
    "column twice": ("a.csv", "text,text\na,b\n", "the header names a column twice"),
    "no column": ("a.csv", "id,body\n1,a\n", r"a\.csv:2: no field 'text' \(has: id, body\)"),
    "no gzip": ("a.jsonl.gz", '{"text": "x"}', "not a complete gzip file"),
    "gzip cut": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "not a complete gzip file"),
    "spreadsheet": ("a.xlsx", "x", r"c\.format: unknown format '\.xlsx'"),
    "packed parquet": ("a.parquet.gz", "x", r"c\.format: unknown format '\.parquet\.gz'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused_while_planning(tmp_path: Path, name: str):
    file, data, message = BAD[name]
    (tmp_path / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ConfigError, match=message) as refused:
        check_local(entry(tmp_path / file), "c")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_null_is_left_out_where_that_is_asked_for(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "The first."}, {"text": None}, {"text": "The third."})
    assert token_windows.read(entry(path, skip_null=True)) == ["The first.", "The third."]


def test_planning_reads_the_first_records_alone(tmp_path: Path):
    good = [{"text": "x"}] * PLANNED
    path = write_lines(tmp_path / "a.jsonl", *good, {"text": None})
    check_local(entry(path), "c")
    with pytest.raises(ConfigError, match=rf"a\.jsonl:{PLANNED + 1}: 'text' holds null"):
        token_windows.read(entry(path))
    with open(tmp_path / "large.json", "w") as file:  # an array whose end is far away, and missing
        file.write("[" + ", ".join(json.dumps(record) for record in good) + ', {"text": "' + "y" * 50_000_000)
    check_local(entry(tmp_path / "large.json"), "c")


CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "holds a text, not a list of messages"),
        ([], "holds an empty list"),
        ([{"role": "user"}], "message 0 of 'messages'"),
        ([{"role": "user", "content": None}], "'messages.0.content' holds null, not a text"),
        (["x"], "message 0 of 'messages' is a text"),
    ],
)
def test_messages_that_are_none_are_refused(tmp_path: Path, value: Any, message: str):
    path = write_lines(tmp_path / "a.jsonl", {"messages": CONVERSATION}, {"messages": value})
    with pytest.raises(ConfigError, match=rf"a\.jsonl:2: .*{message}"):
        check_local(entry(path, field="messages", render="chat_template"), "c")


def test_records_of_a_hub_data_set_are_texts_too(monkeypatch: pytest.MonkeyPatch):
    import datasets

    rows = [{"text": "x"}, {"text": ["y"]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ConfigError, match=r"corpora\.h: record 1 of 'a/b': 'text' holds a list, not a text"):
        token_windows.read({"source": "hub", "id": "a/b", "split": "test"}, "corpora.h")
    assert token_windows.read({"source": "hub", "id": "a/b", "split": "test", "documents": 1}) == ["x"]
