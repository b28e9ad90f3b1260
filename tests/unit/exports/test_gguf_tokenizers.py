"""Tokenizers of GGUF files: names of pre-tokenizers, types of tokens, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gguf_cases import TINY_LLAMA
from quantgrid.exports.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
    read_tokenizer,
)
from quantgrid.ground.errors import ConfigError

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    "name, pre, ignores_merges, normalizer",
    [
        ("gpt-2", WORDS, False, None),
        ("smollm", sequence({"type": "Digits", "individual_digits": True}, WORDS), False, None),
        ("llama-bpe", sequence(split(LLAMA_3), BYTES), True, None),
        ("qwen2", sequence(split(LLAMA_3.replace("{1,3}", "")), BYTES), False, {"type": "NFC"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_pre_tokenizers_have_their_names(name: str, pre: dict, ignores_merges: bool, normalizer: dict | None):
    content = {"pre_tokenizer": pre, "normalizer": normalizer, "model": {"ignore_merges": ignores_merges}}
    assert pre_tokenizer(content, "test") == name


@pytest.mark.parametrize(
    "pre, ignores_merges, normalizer, part",
    [
        (sequence(split(r"\p{L}+"), BYTES), False, None, r"Split \\p{L}\+ then ByteLevel"),
        (sequence(split(LLAMA_3), BYTES), False, None, "ignore_merges False"),
        (WORDS, False, {"type": "Lowercase"}, "normalizer Lowercase"),
        ({**WORDS, "add_prefix_space": True}, False, None, "add_prefix_space"),
        ({"type": "Whitespace"}, False, None, "Whitespace"),
        (None, False, None, "none"),
    ],
    ids=["regex", "merges", "normalizer", "prefix", "type", "missing"],
)
def test_others_are_refused_by_name(pre: dict | None, ignores_merges: bool, normalizer: dict | None, part: str):
    content = {"pre_tokenizer": pre, "normalizer": normalizer, "model": {"ignore_merges": ignores_merges}}
    with pytest.raises(ConfigError, match=part) as caught:
        pre_tokenizer(content, "tokenizer.json")
    assert all(name in str(caught.value) for name in PRE_TOKENIZERS.values())


def changed(folder: Path, change) -> Path:
    """The tiny Llama's tokenizer with a ``change`` of the parsed tokenizer.json."""
    shutil.copytree(TINY_LLAMA, folder, dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_tokens_their_types_and_the_rows_without_one(tmp_path: Path):
    def change(content: dict) -> None:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 512, "content": "<tool>", "special": False})

    found = read_tokenizer(changed(tmp_path, change), 520)
    assert len(found.tokens) == len(found.types) == 520
    assert found.tokens[0] == "<|endoftext|>" and found.types[0] == CONTROL
    assert found.tokens[512] == "<tool>" and found.types[512] == USER_DEFINED
    assert found.types[1] == NORMAL and found.tokens[519] == "[PAD519]" and found.types[519] == UNUSED
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert found.tokens[300] == next(text for text, index in content["vocab"].items() if index == 300)
    assert [tuple(merge.split(" ")) for merge in found.merges] == [tuple(merge) for merge in content["merges"]]
    assert found.special == {"bos": 0, "eos": 0, "pad": 0} and not found.add_bos and not found.add_eos


def test_bos_and_the_chat_template_go_over(tmp_path: Path):
    def change(content: dict) -> None:
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }

    folder = changed(tmp_path, change)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = read_tokenizer(folder, 512)
    assert found.add_bos and not found.add_eos and found.chat_template == "{{ messages }}"


def sentencepiece(content: dict) -> None:
    """Llama 2's kind: bytes, characters, and merges with the spaces of SentencePiece."""
    texts = ["<|endoftext|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    content["model"] |= {
        "vocab": {text: index for index, text in enumerate(texts)},
        "merges": [["a", "b"], ["\u2581", "a"]],
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
    }
    content |= {
        "pre_tokenizer": None,
        "decoder": None,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
    }


def test_sentencepiece_merges_by_scores(tmp_path: Path):
    found = read_tokenizer(changed(tmp_path, sentencepiece), 300)
    assert (found.model, found.pre, found.merges, found.add_space_prefix) == ("llama", "default", [], True)
    scores = dict(zip(found.tokens, found.scores))
    assert scores["ab"] == 0 and scores["\u2581a"] == -1 and scores["a"] == -2
    types = dict(zip(found.tokens, found.types))
    assert types["<0x0A>"] == BYTE and types["<unk>"] == UNKNOWN and types["ab"] == NORMAL


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda content: content["added_tokens"][0].update(lstrip=True), "has lstrip"),
        (lambda content: content["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    ],
    ids=["lstrip", "subword"],
)
def test_parts_that_llama_cpp_does_not_have_are_refused(change, part: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=part):
        read_tokenizer(changed(tmp_path, change), 512)


def test_more_tokens_than_rows_and_a_missing_file_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="token 511, and the embedding has 100 rows"):
        read_tokenizer(TINY_LLAMA, 100)
    with pytest.raises(ConfigError, match="no such file"):
        read_tokenizer(tmp_path, 512)
