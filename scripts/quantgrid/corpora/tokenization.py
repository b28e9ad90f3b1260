"""Tokenization for calibration, perplexity and tasks: token ids of transformers' ``AutoTokenizer``.

A folder may hold tokenizer.json, vocab.json with merges.txt, or only a SentencePiece model
(tokenizer.model); code of a model never runs. transformers takes seconds to import, so it is
imported when a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError
from ..ground.storage import read_json, sha256_of
from ..models.folders import TOKENIZER_FILES, TOKENIZERS


def load_tokenizer(folder: str | Path) -> Any:
    """Load transformers' tokenizer of a model folder; :class:`ConfigError` with the reason on
    failure."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        _check_sentencepiece(folder / "tokenizer.model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # transformers, tokenizers (plain Exception) and JSON raise different exceptions
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"{folder}: its tokenizer cannot be loaded: {reason} (accepted: {', '.join(TOKENIZERS)}; "
            "code of a model never runs)"
        ) from None


def _check_sentencepiece(path: Path) -> None:
    """Refuse a file that is not a SentencePiece model; transformers would read it as tiktoken."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ConfigError(
            f"{path}: not a SentencePiece model; for a tiktoken tokenizer provide tokenizer.json"
        ) from None


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode(text: str, folder: str | Path) -> list[int]:
    """Token ids of ``text`` by the tokenizer in ``folder``, without special tokens."""
    return token_ids(load_tokenizer(folder), text)


def bos_token(folder: str | Path, where: str = "corpus", tokenizer: Any = None) -> int:
    """Id of the BOS token, from the tokenizer in ``folder``, else from its config.json.

    Raises :class:`ConfigError` naming ``where`` if neither has one.
    """
    folder = Path(folder)
    if tokenizer is None and any((folder / name).is_file() for name in TOKENIZERS):
        tokenizer = load_tokenizer(folder)
    identifier = getattr(tokenizer, "bos_token_id", None)
    if identifier is None and (folder / "config.json").is_file():
        identifier = read_json(folder / "config.json").get("bos_token_id")
    if type(identifier) is not int:
        raise ConfigError(f"{where}.add_bos: the tokenizer in {folder} has no BOS token; use add_bos: false")
    return identifier


def require_known(ids: Sequence[int], tokenizer: Any, folder: str | Path, where: str) -> None:
    """Raise :class:`ConfigError` for a token beyond the embedding of the model in ``folder``."""
    path = Path(folder) / "config.json"
    if not path.is_file():  # a tokenizer without a model
        return
    rows, largest = read_json(path)["vocab_size"], max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"{where}: the text holds the token {token!r} with the id {largest}, the embedding has "
            f"{rows} rows and the tokenizer {len(tokenizer)} tokens; {folder} needs the tokenizer that "
            "its model was trained with"
        )


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], at: str) -> str:
    """Render a conversation with the model's chat template.

    Raises :class:`ConfigError` if the template refuses it.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{at}: render: chat_template, but the tokenizer has no chat template (chat_template.jinja, or "
            "chat_template in tokenizer_config.json)"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # templates may raise anything
        raise ConfigError(
            f"{at}: the model's chat template refuses these messages: {' '.join(str(error).split())}"
        ) from None


def tokenizer_sha256(folder: str | Path) -> str | None:
    """The sha256 over the names and digests of the tokenizer files of a folder; None without
    any."""
    files = [Path(folder) / name for name in TOKENIZER_FILES]
    lines = [f"{file.name} {sha256_of(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None
