"""One tokenization everywhere, equal to AutoTokenizer's: calibration, perplexity, tasks; added
tokens, overriding classes, SentencePiece."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from input_cases import TEXT, TINY, add_token, edit_json, sentencepiece_only, tiny, write_lines
from quantgrid.corpora import token_windows, tokenization
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json
from quantgrid.models import fetch

ADDED = "<extra>"


def added_in_settings(folder: Path) -> None:
    """A token that tokenizer_config.json adds to those of tokenizer.json."""
    edit_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder={
            "300": {
                "content": "the",
                "special": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
        },
    )


def added_in_a_file(folder: Path) -> None:
    edit_json(folder / "added_tokens.json", **{ADDED: 512})


def of_another_class(folder: Path) -> None:
    """A class that builds its normalizer and its splitting of words anew, whatever tokenizer.json
    says."""
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    edit_json(folder / "config.json", model_type="qwen2")


def without_backend(folder: Path) -> None:
    """vocab.json and merges.txt alone, as GPT-2 had them."""
    tokenizer = read_json(folder / "tokenizer.json")["model"]
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "vocab.json", **tokenizer["vocab"])
    merges = (" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


@pytest.mark.parametrize("change", [None, added_in_settings, added_in_a_file, of_another_class, without_backend])
def test_corpora_and_tasks_have_the_tokens_of_transformers(tmp_path: Path, change):
    from transformers import AutoTokenizer

    folder = tiny(tmp_path / "model")
    if change:
        change(folder)
    text = f"The e\u0301tude: {ADDED} 12345 methods,\n\n  def f():\n\treturn the other"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (
        token_windows.encode(text, folder) == wanted
        and tokenization.load_tokenizer(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    )
    if change in (added_in_settings, of_another_class):
        assert wanted != token_windows.encode(text, TINY), "otherwise this shows nothing"
    fetch.fetch({"source": "local", "path": str(folder)}, tmp_path / "canonical")
    assert token_windows.encode(text, tmp_path / "canonical") == wanted, (
        "bringing a model to canonical form changes no token"
    )


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    folder = sentencepiece_only(tmp_path / "model")
    fetch.fetch({"source": "local", "path": str(folder)}, tmp_path / "canonical")
    ids = token_windows.encode(TEXT, tmp_path / "canonical")
    assert ids == AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert own.decode(ids) == TEXT.strip(" ") and ids == own.encode(TEXT)[-len(ids) :], (
        "up to the space that SentencePiece puts in front"
    )
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    entry = {"source": "local", "path": str(path), "window": 32, "windows": 2, "add_bos": True}
    windows, info = token_windows.tokenize(entry, tmp_path / "canonical")
    assert (windows[:, 0] == own.bos_id()).all() and len(info["tokenizer_sha256"]) == 64


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (
                (folder / "tokenizer.json").unlink(),
                (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n"),
            ),
            "tokenizer.model: not a SentencePiece model; for a tiktoken tokenizer provide tokenizer.json",
        ),
        (
            lambda folder: edit_json(folder / "tokenizer.json", model={"type": "BPE"}),
            "its tokenizer cannot be loaded: .*code of a model never runs",
        ),
        (
            lambda folder: (
                edit_json(
                    folder / "tokenizer_config.json",
                    tokenizer_class="EvilTokenizer",
                    auto_map={"AutoTokenizer": ["evil.E", None]},
                ),
                edit_json(folder / "config.json", model_type="evil"),
                (folder / "evil.py").write_text("raise SystemExit('it ran')"),
            ),
            "its tokenizer cannot be loaded: ",
        ),
    ],
)
def test_tokenizers_that_cannot_be_read_are_refused_in_a_line(tmp_path: Path, spoil, message: str):
    folder = tiny(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as refused:
        token_windows.encode("x", folder)
    assert "\n" not in str(refused.value)


def test_a_token_beyond_the_embedding_is_refused_with_both_sizes(tmp_path: Path):
    folder = tiny(tmp_path / "model")
    add_token(folder, ADDED, 512)
    path = tmp_path / "text.txt"
    path.write_text("Some words. " * 20)
    entry = {"source": "local", "path": str(path), "window": 8}
    token_windows.tokenize(entry, folder)  # a tokenizer may be larger than its text needs
    path.write_text("Some words. " * 20 + ADDED)
    with pytest.raises(
        ConfigError,
        match="corpora.c: the text holds the token '<extra>' with the id 512, the embedding has 512 rows and the "
        "tokenizer 513 tokens",
    ):
        token_windows.tokenize(entry, folder, where="corpora.c")


def test_windows_beyond_the_positions_need_to_be_asked_for(tmp_path: Path):
    folder = tiny(tmp_path / "model")
    edit_json(folder / "config.json", max_position_embeddings=64)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    entry = {"source": "local", "path": str(path), "window": 65, "windows": 2}
    with pytest.raises(
        ConfigError,
        match=r"corpora.c.window: windows of 65 tokens are longer than the 64 positions .*beyond_positions: true",
    ):
        token_windows.tokenize(entry, folder, where="corpora.c")
    windows, info = token_windows.tokenize({**entry, "beyond_positions": True}, folder)
    assert windows.shape == (2, 65) and info["positions"] == 64
    assert token_windows.tokenize({**entry, "window": 64}, folder)[0].shape == (2, 64)


TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + '\\n' }}{% endfor %}"
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a conversation begins with the user') }}{% endif %}"
    + TEMPLATE
)
CONVERSATIONS = [
    [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": " Indented.\n"}]
    for number in range(9)
]


def test_messages_are_rendered_by_the_models_own_template(tmp_path: Path):
    folder = tiny(tmp_path / "model")
    path = write_lines(tmp_path / "chat.jsonl", *({"messages": messages} for messages in CONVERSATIONS))
    entry = {
        "source": "local",
        "path": str(path),
        "field": "messages",
        "render": "chat_template",
        "window": 16,
        "join": "",
    }
    with pytest.raises(
        ConfigError, match=r"chat\.jsonl:1: render: chat_template, but the tokenizer has no chat template"
    ):
        token_windows.tokenize(entry, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    windows, info = token_windows.tokenize(entry, folder)
    text = "".join(f"<user> Question {number}?\n<assistant>  Indented.\n\n" for number in range(9))
    assert windows.flatten().tolist() == token_windows.encode(text, folder)[: windows.numel()]
    assert info["documents"] == 9 and info["text_sha256"] != hashlib.sha256(text.encode()).hexdigest()
    (folder / "chat_template.jinja").write_text("other" + TEMPLATE)
    again, other = token_windows.tokenize(entry, folder)
    assert not torch.equal(again[: len(windows)], windows) and other["text_sha256"] == info["text_sha256"], (
        "one corpus for models of two templates"
    )


def test_a_template_that_refuses_is_named_with_the_line(tmp_path: Path):
    folder = tiny(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(STRICT)
    path = write_lines(tmp_path / "chat.jsonl", {"m": CONVERSATIONS[0]}, {"m": CONVERSATIONS[0][1:]})
    with pytest.raises(
        ConfigError,
        match=r"chat\.jsonl:2: the model's chat template refuses these messages: a conversation begins with the user",
    ):
        token_windows.tokenize(
            {"source": "local", "path": str(path), "field": "m", "render": "chat_template", "window": 8}, folder
        )


def test_the_token_that_begins_a_sequence(tmp_path: Path):
    folder = tiny(tmp_path / "model")
    assert token_windows.bos_token(folder) == 0
    settings = {key: value for key, value in read_json(folder / "tokenizer_config.json").items() if key != "bos_token"}
    (folder / "tokenizer_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", **settings)
    edit_json(folder / "config.json", bos_token_id=7)
    assert token_windows.bos_token(folder) == 7
    edit_json(folder / "config.json", bos_token_id=None)
    with pytest.raises(ConfigError, match=r"c\.add_bos: the tokenizer in .* has no BOS token"):
        token_windows.bos_token(folder, "c")
