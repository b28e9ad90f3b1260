"""Small models, tokenizers and files for the tests of what people bring."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from quantgrid.ground.storage import read_json

TINY = Path(__file__).parent / "data" / "tiny-llama"
TEXT = (Path(__file__).parent / "data" / "smoke-calibration.txt").read_text()


def tiny(folder: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(TINY, folder))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(read_json(path) if path.is_file() else {}), **changes}))


def add_token(folder: Path, content: str, identifier: int) -> None:
    """One more token in a folder's tokenizer.json."""
    tokenizer = read_json(folder / "tokenizer.json")
    token = {
        "id": identifier,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    edit_json(folder / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], token])


def sentencepiece_only(folder: Path) -> Path:
    """The tiny model with a small SentencePiece tokenizer (byte fallback, identity normalization)
    as its only one."""
    from sentencepiece import SentencePieceTrainer

    tiny(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def write_lines(path: Path, *records: Any) -> Path:
    """JSON lines, packed where the name says so."""
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
