"""Text to calibrate on and to measure perplexity on, from four sources, as windows of tokens.

``library_docs``  docstrings of the pinned libraries: {part: calibration | evaluation}; the same text on every machine (:mod:`.library_docs`).
``builtin``  CPython's own ``pydoc_data.topics``: {part: calibration | evaluation}; needs nothing but Python, and varies with its version.
``local``    a file: {path, format: text | jsonl | json | csv | parquet (else from the suffix), field: text} (:mod:`.text_records`).
``hub``      a dataset: {id, name, split, field, revision, data_files, documents: first so many, streamed}, through ``datasets``.

The documents are joined by ``join`` (a blank line), tokenized as one stream and cut into ``windows`` windows of ``window`` tokens that never
overlap, as the perplexity protocol of GPTQ (arXiv 2210.17323) and of the paper does. Keys of every entry: source, join, window, windows
(absent: all there are), selection (sequential | random), add_bos, beyond_positions (windows may be longer than the
model's positions). Of files and data sets: skip_null (records whose field is null are left out), render: chat_template (the
field holds messages, which the model's chat template makes text of). A value that is not a text is refused with its place.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import library_docs
from .corpus_files import CHAT, read_hub, read_local
from .errors import ConfigError, unknown_name
from .hub import with_commit
from .library_docs import PARTS, unrepeated
from .model_shapes import positions_in, require_positions
from .storage import read_metadata, read_tensors, write_tensors
from .text_records import Located
from .tokenization import bos_token, load_tokenizer, rendered, require_known, token_ids, tokenizer_sha256
from .tokenization import encode as encode  # for texts that are in no corpus

if TYPE_CHECKING:
    import torch

SELECTIONS = ("sequential", "random")
_RUN = 64  # tokens: so long a run in two corpora is the same text, not chance


def read(entry: Mapping[str, Any], where: str = "corpus", tokenizer: Any = None) -> list[str]:
    """The documents of a corpus entry, in their order. ``where`` is the config key that messages name; raises :class:`ConfigError`.

    ``tokenizer`` renders conversations where the entry asks for that.
    """
    return _texts(entry, documents_of(entry, where), where, tokenizer)


def documents_of(entry: Mapping[str, Any], where: str = "corpus") -> list[Located]:
    """(place, text or messages) of every document, None for a null that ``skip_null`` leaves out."""
    sources = {"library_docs": _read_library_docs, "builtin": _read_builtin, "local": read_local, "hub": read_hub}
    if entry.get("source") not in sources:
        raise ConfigError(f"{where}.source: {unknown_name('source', entry.get('source'), sources)}")
    return sources[entry["source"]](entry, where)  # blank rows too: the usual protocol joins the rows of a data set as they are


def _texts(entry: Mapping[str, Any], documents: list[Located], where: str, tokenizer: Any) -> list[str]:
    kept = [(at, value) for at, value in documents if value is not None]
    texts = [rendered(tokenizer, value, at) for at, value in kept] if entry.get("render") == CHAT else [value for _, value in kept]
    if not any(text.strip() for text in texts):
        raise ConfigError(f"{where}: holds no text")
    return texts


def join(entry: Mapping[str, Any], documents: list[str]) -> str:
    """One text: the documents with ``entry['join']`` (default: a blank line) between them."""
    return entry.get("join", "\n\n").join(documents)


def _read_builtin(entry: Mapping[str, Any], where: str) -> list[Located]:
    """About 60 % of the topics, by the sha256 of their names, are calibration, the others evaluation.

    Many topics include others word for word, so a paragraph is kept where it is met first, calibration before evaluation.
    """
    from pydoc_data.topics import topics

    _check_part(entry, where)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in sorted(topics):
        parts[PARTS[int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 >= 6]].append(topics[name])
    seen: set[str] = set()
    kept = {part: [unrepeated(text, seen) for text in texts] for part, texts in parts.items()}
    return [(where, text) for text in kept[entry["part"]]]


def _read_library_docs(entry: Mapping[str, Any], where: str) -> list[Located]:
    _check_part(entry, where)
    return [(where, text) for text in library_docs.documents(entry["part"])]


def _check_part(entry: Mapping[str, Any], where: str) -> None:
    if entry.get("part") not in PARTS:
        raise ConfigError(f"{where}.part: {unknown_name('part', entry.get('part'), PARTS)}")


def starts(tokens: int, window: int, count: int | None, selection: str, seed: int, where: str = "corpus") -> list[int]:
    """First positions of ``count`` windows (None: all) of ``window`` tokens, none overlapping, in a stream of ``tokens``.

    ``sequential`` begins at 0; ``random`` draws a phase and then slots without replacement, so that fewer windows are a prefix of more.
    """
    if selection not in SELECTIONS:
        raise ConfigError(f"{where}.selection: {unknown_name('selection', selection, SELECTIONS)}")
    for key, value in (("window", window), ("windows", count)):
        if not ((isinstance(value, int) and value > 0) or (key == "windows" and value is None)):
            raise ConfigError(f"{where}.{key}: {value!r} is not a whole number above 0")
    available = tokens // window
    if available < (count or 1):
        raise ConfigError(f"{where}: its {tokens} tokens make {available} windows of {window}, {count or 1} are asked for; "
                          f"set windows to at most {available}, a shorter window, or name a longer corpus")
    if selection == "sequential":
        return [slot * window for slot in range(count or available)]
    drawn = random.Random(seed)
    phase = drawn.randint(0, tokens - available * window)
    return [phase + slot * window for slot in drawn.sample(range(available), available)[:count]]


def tokenize(entry: Mapping[str, Any], tokenizer_folder: str | Path, seed: int = 0,
             where: str = "corpus") -> tuple[torch.Tensor, dict[str, Any]]:
    """The corpus of ``entry`` as (windows, info): int64 [windows, window], and what made them (JSON: checksums, counts, options).

    With ``add_bos`` each window begins with the BOS token and holds window - 1 tokens of text. Raises :class:`ConfigError` for unreadable
    sources, a corpus too short, windows beyond the model's positions and tokens beyond its embedding.
    """
    import torch

    positions = positions_in(tokenizer_folder)
    require_positions(entry, positions, where, f"the model in {tokenizer_folder}")
    tokenizer = load_tokenizer(tokenizer_folder)
    if entry["source"] == "hub":
        entry = with_commit(entry, where)
    documents = documents_of(entry, where)
    texts = _texts(entry, documents, where, tokenizer)
    ids = token_ids(tokenizer, join(entry, texts))
    bos = bos_token(tokenizer_folder, where, tokenizer) if entry.get("add_bos") else None
    require_known([*ids, *([] if bos is None else [bos])], tokenizer, tokenizer_folder, where)
    window, selection = entry.get("window", 2048), entry.get("selection", "sequential")
    stride = window - (bos is not None) if isinstance(window, int) else window
    begins = starts(len(ids), stride, entry.get("windows"), selection, seed, where)
    stream = torch.tensor(ids, dtype=torch.int64)
    windows = torch.stack([stream[begin:begin + stride] for begin in begins])
    if bos is not None:
        windows = torch.cat([torch.full((len(begins), 1), bos), windows], dim=1)
    info = {**_text_info(entry, documents, texts), "tokens": len(ids), "windows": len(begins), "window": window, "stride": stride,
            "positions": positions, "selection": selection, "seed": seed, "add_bos": bos is not None, "bos_token_id": bos,
            "tokenizer_sha256": tokenizer_sha256(tokenizer_folder)}
    return windows, info


def _text_info(entry: Mapping[str, Any], documents: list[Located], texts: list[str]) -> dict[str, Any]:
    """Content of a corpus. ``text_sha256`` is that of the conversations where a template renders them: models render differently."""
    keys = ("source", "part", "path", "id", "name", "split", "field", "revision", "commit", "render")
    options = {key: entry[key] for key in keys if entry.get(key) is not None}
    source = join(entry, texts)
    if entry.get("render") == CHAT:
        source = "\n".join(json.dumps(value, sort_keys=True) for _, value in documents if value is not None)
    found = {**options, "text_sha256": hashlib.sha256(source.encode()).hexdigest(), "documents": len(texts),
             "skipped": len(documents) - len(texts), "characters": len(join(entry, texts)), "join": entry.get("join", "\n\n")}
    return found | ({"python": platform.python_version()} if entry["source"] == "builtin" else {})


def save(path: str | Path, windows: torch.Tensor, info: Mapping[str, Any]) -> None:
    """Write what :func:`tokenize` returned as one safetensors file (tensor ``windows``, int32)."""
    import torch

    write_tensors(path, {"windows": windows.to(torch.int32)}, info)


def load(path: str | Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """The (windows, info) that :func:`save` wrote; windows int64 [windows, window]."""
    return read_tensors(path)["windows"].long(), read_metadata(path)


def _run_hashes(windows: torch.Tensor, run: int) -> torch.Tensor:
    """Hash of every ``run`` consecutive tokens (a power of two): int64 [windows, window - run + 1], wrapping as it may."""
    hashes, length = (windows.long() + 1) * 0x2545F4914F6CDD1D, 1
    while length < run:
        hashes = hashes[:, :-length] * 0x5851F42D4C957F2D + (hashes[:, length:] ^ (hashes[:, length:] >> 29))
        length *= 2
    return hashes


def overlap(first: torch.Tensor, second: torch.Tensor, run: int = _RUN) -> int:
    """How many windows of ``second`` hold ``run`` consecutive tokens (lowered to what the windows hold) that ``first`` holds too."""
    import torch

    run = 1 << (min(run, first.shape[1], second.shape[1]).bit_length() - 1)
    return int(torch.isin(_run_hashes(second, run), _run_hashes(first, run)).any(dim=1).sum())


def check_disjoint(calibration: torch.Tensor, evaluation: torch.Tensor, names: tuple[str, str] = PARTS, tolerance: float = 0.01) -> int:
    """Refuse to evaluate on what was calibrated on: :class:`ConfigError` where more than ``tolerance`` of the windows overlap; else their count."""
    shared = overlap(calibration, evaluation)
    if shared > tolerance * len(evaluation):
        raise ConfigError(f"{shared} of {len(evaluation)} windows of corpus '{names[1]}' are (in part) also in corpus '{names[0]}': the evaluation "
                          "would see calibration text; choose another split, part or file for one of them")
    return shared
