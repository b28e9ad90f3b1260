"""Corpora: the built-in text and its disjoint parts, files, windows, and what is refused."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import plan_cases
from build_tiny_model import perplexity, unigram_perplexity
from quantgrid.corpora import library_docs, token_windows
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT

TINY = ROOT / "tests" / "data" / "tiny-llama"
BUILTIN = {part: {"source": "builtin", "part": part, "window": 128} for part in token_windows.PARTS}


@pytest.fixture(scope="module")
def parts():
    return {part: token_windows.tokenize(entry, TINY) for part, entry in BUILTIN.items()}


def test_builtin_parts_are_large_and_share_nothing(parts):
    calibration, evaluation = (parts[part][0] for part in token_windows.PARTS)
    assert len(calibration) > 400 and len(evaluation) > 250
    assert token_windows.check_disjoint(calibration, evaluation) == 0
    assert 0.5 < len(calibration) / (len(calibration) + len(evaluation)) < 0.7
    paragraphs = [
        {
            " ".join(paragraph.split())
            for text in token_windows.read(entry)
            for paragraph in text.split("\n\n")
            if len(paragraph) > 80
        }
        for entry in BUILTIN.values()
    ]
    assert not paragraphs[0] & paragraphs[1]


def test_info_names_what_made_the_windows(parts):
    info = parts["calibration"][1]
    text = token_windows.join({}, token_windows.read(BUILTIN["calibration"]))
    assert info["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {
        "python",
        "tokens",
        "join",
        "window",
        "windows",
        "stride",
        "tokenizer_sha256",
        "add_bos",
        "seed",
    } <= info.keys()
    json.dumps(info, allow_nan=False)
    assert token_windows.tokenize(BUILTIN["calibration"], TINY)[1] == info


def test_tokens_are_those_of_transformers():
    from transformers import AutoTokenizer

    text = 'A "str" object\'s methods:\n\n   >>> f(1, 2)\n   3\n\nÄ, 漢, 🙂 and tabs\t.'
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert token_windows.encode(text, TINY) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(token_windows.encode(text, TINY)) == text


def test_windows_do_not_overlap_and_random_ones_follow_the_seed():
    assert token_windows.starts(100, 30, None, "sequential", 0) == [0, 30, 60]
    many, few = token_windows.starts(1003, 10, 50, "random", 5), token_windows.starts(1003, 10, 20, "random", 5)
    assert many[:20] == few and many != token_windows.starts(1003, 10, 50, "random", 6)
    ordered = sorted(many)
    assert all(later - earlier >= 10 for earlier, later in pairwise(ordered)) and ordered[-1] + 10 <= 1003


def test_bos_opens_every_window(parts):
    windows, info = token_windows.tokenize({**BUILTIN["evaluation"], "add_bos": True, "windows": 4}, TINY)
    assert windows.shape == (4, 128) and (windows[:, 0] == 0).all() and info["stride"] == 127
    assert torch.equal(windows[:, 1:].flatten(), parts["evaluation"][0].flatten()[: 4 * 127])


def test_saved_windows_come_back(tmp_path, parts):
    token_windows.save(tmp_path / "c.safetensors", *parts["evaluation"])
    windows, info = token_windows.load(tmp_path / "c.safetensors")
    assert (
        torch.equal(windows, parts["evaluation"][0]) and windows.dtype == torch.int64 and info == parts["evaluation"][1]
    )


def test_files_of_three_formats_give_the_same_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    documents = ["one line\u2028with a separator", "two\r\nlines"]
    (tmp_path / "a.txt").write_bytes("\n\n".join(documents).encode())
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in documents) + "\n"
    )
    pyarrow.parquet.write_table(pyarrow.table({"body": documents}), tmp_path / "a.parquet")
    entries = [
        {"source": "local", "path": str(tmp_path / f"a.{suffix}"), "field": "body"}
        for suffix in ("txt", "jsonl", "parquet")
    ]
    texts = {token_windows.join(entry, token_windows.read(entry)) for entry in entries}
    assert texts == {"\n\n".join(documents)}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", None, {}, "no such file"),
        ("a.txt", " \n", {}, "holds no text"),
        ("a.doc", "text", {}, r"c\.format: unknown format '\.doc'.*jsonl, parquet, text"),
        ("a.jsonl", '{"body": "x"}', {}, r"a\.jsonl:1: no field 'text' \(has: body\)"),
        ("a.jsonl", '{"text": "x"}\nnot json', {}, r"a\.jsonl:2: not a JSON line"),
        ("a.parquet", "no parquet", {}, "not a parquet file"),
        (
            "a.txt",
            "a few words",
            {"window": 64, "windows": 3},
            "make 0 windows of 64, but 3 are requested; set windows to at most",
        ),
        ("a.txt", "a few words", {"window": 0}, r"c\.window: 0 is not a whole number above 0"),
        ("a.txt", "a few words", {"window": 2, "selection": "randomly"}, "did you mean 'random'"),
    ],
)
def test_bad_corpora_are_refused(tmp_path, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        token_windows.tokenize({"source": "local", "path": str(tmp_path / name), **options}, TINY, where="c")


def test_unknown_sources_parts_and_missing_bos_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown source 'builtins' - did you mean 'builtin'"):
        token_windows.read({"source": "builtins"})
    with pytest.raises(ConfigError, match="did you mean 'calibration'"):
        token_windows.read({"source": "builtin", "part": "calibrate"})
    with pytest.raises(ConfigError, match="has no BOS token"):
        token_windows.bos_token(tmp_path)


def test_shared_text_is_found_wherever_it_stands():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 50, (8, 256), generator=generator) for _ in range(2))
    assert token_windows.overlap(first, second) == 0 and token_windows.overlap(first, first) == 8
    second[3, 17:117] = first[6, 100:200]
    assert token_windows.overlap(first, second) == 1
    with pytest.raises(ConfigError, match="1 of 8 windows of corpus 'test'.*corpus 'train'"):
        token_windows.check_disjoint(first, second, ("train", "test"))


def test_hub_failure_gives_the_reason(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match="dataset 'a/b' cannot be read: Couldn't reach.*hf auth login"):
        token_windows.read({"source": "hub", "id": "a/b", "split": "test"})


def test_tiny_model_has_learnt_from_the_corpus(parts):
    from transformers import LlamaForCausalLM

    (trained, _), (held_out, _) = (parts[part] for part in token_windows.PARTS)
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    assert perplexity(model, held_out[:48]) < 0.2 * unigram_perplexity(trained, held_out[:48])


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[str]]:
    return {part: library_docs.documents(part) for part in token_windows.PARTS}


def test_held_out_docstrings_are_large_and_share_no_paragraph_with_each_other_or_training(
    held_out: dict[str, list[str]],
):
    paragraphs = {
        part: {" ".join(text.split()) for document in documents for text in document.split("\n\n") if len(text) >= 60}
        for part, documents in held_out.items()
    }
    assert all(sum(map(len, documents)) > 400_000 for documents in held_out.values())
    assert not paragraphs["calibration"] & paragraphs["evaluation"]
    packages = {
        name.split(".")[0] for name, _ in library_docs.modules("networkx") if library_docs.part_of(name) == "evaluation"
    }
    assert packages == {"networkx"}, "a part has modules of every package"


def test_a_docstring_is_read_without_running_its_file(tmp_path: Path):
    file = tmp_path / "module.py"
    long = "It says in more than eighty characters what the following statements would do if they ever ran."
    file.write_text(f'"""Module.\n\n    {long}"""\nraise SystemExit("it ran")\ndef f():\n    "{long} Twice."\n')
    assert library_docs.docstrings(file) == f"Module.\n\n{long}\n\n{long} Twice."


def test_a_corpus_of_docstrings_names_its_libraries():
    made = plan_cases.plan(
        {
            **plan_cases.content(),
            "corpora": {
                name: {
                    "source": "library_docs" if name == "docs" else "builtin",
                    "part": "evaluation" if name in ("docs", "more") else "calibration",
                    "window": 64,
                    "windows": 24,
                }
                for name in ("text", "short", "docs", "more")
            },
        }
    )
    assert made.tokenize_corpus("tiny", "docs").spec["libraries"]["scipy"] == version("scipy")
