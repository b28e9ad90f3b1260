"""Training text of the reference models: a tokenizer and a token stream, cached in a folder.

A byte-level BPE (GPT-2's pre-tokenization) is trained on all training documents. Token 0 is
``<|endoftext|>``: it precedes every document and serves as first and last token. Text, tokenizer
and tokens depend on the installed versions, which are recorded with their sha256.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ..corpora import library_docs
from ..ground.provenance import versions
from ..ground.storage import read_metadata, read_tensors, replacing, write_json, write_tensors

END = "<|endoftext|>"
VOCABULARY = 4096
POSITIONS = 2048
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "pad_token": END,
    "model_max_length": POSITIONS,
}
_STREAM = "tokens.safetensors"


def prepare(folder: Path) -> tuple[Tensor, dict[str, object]]:
    """(token stream int32 [tokens], provenance) of the training text; writes the tokenizer to
    ``folder``.

    Recomputed if missing or made by other versions.
    """
    made_by = text_versions()
    if (folder / _STREAM).is_file() and read_metadata(folder / _STREAM)["versions"] == made_by:
        return read_tensors(folder / _STREAM)["tokens"], read_metadata(folder / _STREAM)
    documents = library_docs.training_documents()
    train_tokenizer(folder, documents)
    tokens = stream(Tokenizer.from_file(str(folder / "tokenizer.json")), documents)
    about = {
        "versions": made_by,
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "tokens": len(tokens),
        "bytes": sum(len(text.encode()) for text in documents),
        "text_sha256": sha256_of_texts(documents),
    }
    write_tensors(folder / _STREAM, {"tokens": tokens}, about)
    return tokens, about


def text_versions() -> dict[str, str]:
    """Versions of Python and of all packages with docstrings in the text, by name on PyPI."""
    names = {"PIL": "pillow", "lm_eval": "lm-eval", "yaml": "pyyaml"}
    packages = [*library_docs.PACKAGES.values(), *(names.get(name, name) for name in library_docs.TRAINING_PACKAGES)]
    return {"python": platform.python_version(), **versions(*sorted(packages))}


def sha256_of_texts(documents: Iterable[str]) -> str:
    """Hexadecimal sha256 of documents, with a zero byte after each."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def train_tokenizer(folder: Path, documents: Sequence[str]) -> None:
    """Train a byte-level BPE of ``VOCABULARY`` tokens and write it in transformers' format to
    ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary), pretty=False)
    write_json(folder / "tokenizer_config.json", _TOKENIZER)


def stream(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    """Tokens of all documents, ``END`` before each: int32 [tokens]."""
    end, pieces = tokenizer.token_to_id(END), []
    for first in range(0, len(documents), 64):
        encoded = tokenizer.encode_batch(documents[first : first + 64], add_special_tokens=False)
        pieces += [torch.tensor([end, *encoding.ids], dtype=torch.int32) for encoding in encoded]
    return torch.cat(pieces)


def windows(tokens: Tensor, window: int) -> Tensor:
    """Consecutive windows of a stream: int64 [count, window]; the remainder is dropped."""
    count = len(tokens) // window
    return tokens[: count * window].reshape(count, window).long()
