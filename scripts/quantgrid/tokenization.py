"""Token ids as transformers' ``AutoTokenizer`` gives them: the one tokenization of calibration, perplexity and tasks.

A folder may hold tokenizer.json, vocab.json with merges.txt, or a SentencePiece model (tokenizer.model) alone; no code
of a model is run. transformers takes seconds to import, so that it is imported where a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .model_shapes import TOKENIZER_FILES, TOKENIZERS
from .storage import read_json, sha256_of


def load_tokenizer(folder: str | Path) -> Any:
    """transformers' tokenizer of a model folder; :class:`ConfigError` with the reason where it cannot be loaded."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        _check_sentencepiece(folder / "tokenizer.model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers (whose kind is Exception itself) and JSON each have their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{folder}: its tokenizer cannot be loaded: {reason} (accepted: {', '.join(TOKENIZERS)}; "
                          "code of a model never runs)") from None


def _check_sentencepiece(path: Path) -> None:
    """Refuse what is no SentencePiece model, which transformers would take for a file of tiktoken."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ConfigError(f"{path}: not a SentencePiece model; of a tiktoken tokenizer bring the "
                          "tokenizer.json") from None


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, with no special token added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode(text: str, folder: str | Path) -> list[int]:
    """Token ids of ``text`` by the tokenizer in ``folder``, with no special token added."""
    return token_ids(load_tokenizer(folder), text)


def bos_token(folder: str | Path, where: str = "corpus", tokenizer: Any = None) -> int:
    """Id of the token that begins a sequence, by the tokenizer in ``folder``, else by its config.json.

    Raises :class:`ConfigError` naming ``where`` if neither has one.
    """
    folder = Path(folder)
    if tokenizer is None and any((folder / name).is_file() for name in TOKENIZERS):
        tokenizer = load_tokenizer(folder)
    identifier = getattr(tokenizer, "bos_token_id", None)
    if identifier is None and (folder / "config.json").is_file():
        identifier = read_json(folder / "config.json").get("bos_token_id")
    if type(identifier) is not int:
        raise ConfigError(f"{where}.add_bos: the tokenizer in {folder} has no token that begins a sequence; use "
                          "add_bos: false")
    return identifier


def require_known(ids: Sequence[int], tokenizer: Any, folder: str | Path, where: str) -> None:
    """:class:`ConfigError` with both sizes where a token has no row in the embedding of the model in ``folder``."""
    path = Path(folder) / "config.json"
    if not path.is_file():  # a tokenizer without a model
        return
    rows, largest = read_json(path)["vocab_size"], max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(f"{where}: the text holds the token {token!r} with the id {largest}, the embedding has "
                          f"{rows} rows and the tokenizer {len(tokenizer)} tokens; {folder} needs the tokenizer that "
                          "its model was trained with")


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], at: str) -> str:
    """A conversation as text, by the model's own chat template, which may refuse it (:class:`ConfigError`)."""
    if not tokenizer.chat_template:
        raise ConfigError(f"{at}: render: chat_template, and the tokenizer has none (chat_template.jinja, or "
                          "chat_template in tokenizer_config.json)")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"{at}: the model's chat template refuses these messages: "
                          f"{' '.join(str(error).split())}") from None


def tokenizer_sha256(folder: str | Path) -> str | None:
    """The sha256 of the names and digests of the files that decide a folder's tokens; None where there are none."""
    files = [Path(folder) / name for name in TOKENIZER_FILES]
    lines = [f"{file.name} {sha256_of(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None
