"""Token windows for calibration and perplexity, from corpora of four sources.

``library_docs``  docstrings of the pinned libraries: {part: calibration | evaluation}; the same
                  text on every machine (:mod:`.library_docs`).
``builtin``  CPython's own ``pydoc_data.topics``: {part: calibration | evaluation}; needs only
             Python, and varies with its version.
``local``    a file: {path, format: text | jsonl | json | csv | parquet (else from the suffix),
             field: text} (:mod:`.text_records`).
``hub``      a data set: {id, name, split, field, revision, data_files, documents: the first N,
             streamed}, through ``datasets``.

The documents are joined by ``join`` (a blank line), tokenized as one stream and cut into
``windows`` non-overlapping windows of ``window`` tokens, the perplexity protocol of GPTQ (arXiv
2210.17323) and of the paper. Keys of every entry: source, join, window, windows (absent: all),
selection (sequential | random), skip_windows (windows left out before the first), add_bos,
beyond_positions (accepts windows longer than the model's positions). Files and data sets also have:
skip_null (drops records with a null field), render: chat_template (the field holds messages for the
model's chat template). A value that is not a text is refused with its location.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ground.errors import ConfigError, unknown_name
from ..ground.storage import open_tensors, read_metadata, write_tensors
from ..models.positions import has_position_table, positions_in, require_positions
from . import library_docs
from .documents import CHAT, read_hub, read_local
from .hub import with_commit
from .library_docs import PARTS, unrepeated
from .text_records import Located
from .tokenization import bos_token, load_tokenizer, rendered, require_known, token_ids, tokenizer_sha256
from .tokenization import encode as encode  # for texts outside corpora

if TYPE_CHECKING:
    import torch

WINDOW = 2048  # tokens of an entry without the key
SELECTIONS = ("sequential", "random")
_RUN = 64  # tokens: two corpora with an equal run of this length share text, beyond chance


def read(entry: Mapping[str, Any], where: str = "corpus", tokenizer: Any = None) -> list[str]:
    """Documents of a corpus entry, in order.

    ``where`` is the config key in messages. ``tokenizer`` renders conversations if the entry
    requests it. Raises :class:`ConfigError`.
    """
    return _texts(entry, documents_of(entry, where), where, tokenizer)


def documents_of(entry: Mapping[str, Any], where: str = "corpus") -> list[Located]:
    """(location, text or messages) of every document; None for a null that ``skip_null`` drops."""
    sources = {"library_docs": _read_library_docs, "builtin": _read_builtin, "local": read_local, "hub": read_hub}
    if entry.get("source") not in sources:
        raise ConfigError(f"{where}.source: {unknown_name('source', entry.get('source'), sources)}")
    return sources[entry["source"]](
        entry, where
    )  # blank rows too: the usual protocol joins the rows of a data set unchanged


def _texts(entry: Mapping[str, Any], documents: list[Located], where: str, tokenizer: Any) -> list[str]:
    kept = [(at, value) for at, value in documents if value is not None]
    texts = (
        [rendered(tokenizer, value, at) for at, value in kept]
        if entry.get("render") == CHAT
        else [value for _, value in kept]
    )
    if not any(text.strip() for text in texts):
        raise ConfigError(f"{where}: holds no text")
    return texts


def join(entry: Mapping[str, Any], documents: list[str]) -> str:
    """Join the documents with ``entry['join']`` (default: a blank line)."""
    return entry.get("join", "\n\n").join(documents)


def _read_builtin(entry: Mapping[str, Any], where: str) -> list[Located]:
    """Topics of CPython: about 60 % are calibration, by the sha256 of their names, the rest
    evaluation.

    Many topics include others word for word, so the first copy of a paragraph is kept, calibration
    before evaluation.
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
    """First positions of ``count`` non-overlapping windows (None: all) in a stream of ``tokens``.

    Windows have ``window`` tokens. ``sequential`` begins at 0; ``random`` draws a phase and then
    slots without replacement, so that fewer windows are a prefix of more.
    """
    if selection not in SELECTIONS:
        raise ConfigError(f"{where}.selection: {unknown_name('selection', selection, SELECTIONS)}")
    for key, value in (("window", window), ("windows", count)):
        if not ((isinstance(value, int) and value > 0) or (key == "windows" and value is None)):
            raise ConfigError(f"{where}.{key}: {value!r} is not a whole number above 0")
    available = tokens // window
    _require(count or 1, available, tokens, window, where)
    if selection == "sequential":
        return [slot * window for slot in range(count or available)]
    drawn = random.Random(seed)
    phase = drawn.randint(0, tokens - available * window)
    return [phase + slot * window for slot in drawn.sample(range(available), available)[:count]]


def _require(count: int, available: int, tokens: int, window: int, where: str) -> None:
    """Raise :class:`ConfigError` if ``count`` windows of ``window`` are not ``available`` in
    ``tokens``."""
    if available < count:
        raise ConfigError(
            f"{where}: its {tokens} tokens make {available} windows of {window}, but {count} are requested; "
            f"set windows to at most {available}, or use a shorter window or a longer corpus"
        )


def _begins(entry: Mapping[str, Any], tokens: int, stride: int, selection: str, seed: int, where: str) -> list[int]:
    """First positions of the windows of an entry, behind those that it skips."""
    count, skipped = entry.get("windows"), entry.get("skip_windows", 0)
    if not skipped:
        return starts(tokens, stride, count, selection, seed, where)
    found = starts(tokens, stride, skipped + (count or 1), selection, seed, where)
    return (found if count else starts(tokens, stride, None, selection, seed, where))[skipped:]


def tokenize(
    entry: Mapping[str, Any], tokenizer_folder: str | Path, seed: int = 0, where: str = "corpus"
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Tokenize the corpus of ``entry``: (windows, info).

    Windows are int64 [windows, window]; info is JSON (checksums, counts, options). With ``add_bos``
    each window begins with the BOS token and holds window - 1 tokens of text. Raises
    :class:`ConfigError` for unreadable sources, a corpus too short, windows beyond the model's
    positions and tokens beyond its embedding.
    """
    import torch

    positions = positions_in(tokenizer_folder)
    table = has_position_table(tokenizer_folder)
    require_positions(entry, positions, where, f"the model in {tokenizer_folder}", table)
    tokenizer = load_tokenizer(tokenizer_folder)
    if entry["source"] == "hub":
        entry = with_commit(entry, where)
    documents = documents_of(entry, where)
    texts = _texts(entry, documents, where, tokenizer)
    ids = token_ids(tokenizer, join(entry, texts))
    bos = bos_token(tokenizer_folder, where, tokenizer) if entry.get("add_bos") else None
    require_known([*ids, *([] if bos is None else [bos])], tokenizer, tokenizer_folder, where)
    window, selection = entry.get("window", WINDOW), entry.get("selection", "sequential")
    stride = window - (bos is not None) if isinstance(window, int) else window
    begins = _begins(entry, len(ids), stride, selection, seed, where)
    stream = torch.tensor(ids, dtype=torch.int64)
    windows = torch.stack([stream[begin : begin + stride] for begin in begins])
    if bos is not None:
        windows = torch.cat([torch.full((len(begins), 1), bos), windows], dim=1)
    info = {
        **_text_info(entry, documents, texts),
        "tokens": len(ids),
        "windows": len(begins),
        "window": window,
        "stride": stride,
        "positions": positions,
        "selection": selection,
        "seed": seed,
        **({"skip_windows": entry["skip_windows"]} if entry.get("skip_windows") else {}),
        "add_bos": bos is not None,
        "bos_token_id": bos,
        "tokenizer_sha256": tokenizer_sha256(tokenizer_folder),
    }
    return windows, info


def _text_info(entry: Mapping[str, Any], documents: list[Located], texts: list[str]) -> dict[str, Any]:
    """Content of a corpus for its info.

    ``text_sha256`` covers the conversations if a template renders them, because models render
    differently.
    """
    keys = ("source", "part", "path", "id", "name", "split", "field", "revision", "commit", "render")
    options = {key: entry[key] for key in keys if entry.get(key) is not None}
    source = join(entry, texts)
    if entry.get("render") == CHAT:
        source = "\n".join(json.dumps(value, sort_keys=True) for _, value in documents if value is not None)
    found = {
        **options,
        "text_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "documents": len(texts),
        "skipped": len(documents) - len(texts),
        "characters": len(join(entry, texts)),
        "join": entry.get("join", "\n\n"),
    }
    return found | ({"python": platform.python_version()} if entry["source"] == "builtin" else {})


def save(path: str | Path, windows: torch.Tensor, info: Mapping[str, Any]) -> None:
    """Write the output of :func:`tokenize` as a safetensors file (tensor ``windows``, int32)."""
    import torch

    write_tensors(path, {"windows": windows.to(torch.int32)}, info)


def load(path: str | Path, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read the (windows, info) written by :func:`save`; windows int64 [windows, window].

    Windows are those from ``start`` up to ``stop`` (None: all); :class:`ConfigError` if there are
    fewer than ``stop``.
    """
    info = read_metadata(path)
    with open_tensors(path) as file:
        held = file.get_slice("windows")
        available, window = held.get_shape()
        if stop is not None:
            stride = info.get("stride", window)
            tokens, where = info.get("tokens", available * stride), f"corpora.{info.get('corpus', path)}"
            _require(stop, available, tokens, stride, where)
        return held[start:stop].long(), info


def _run_hashes(windows: torch.Tensor, run: int) -> torch.Tensor:
    """Hash of every ``run`` consecutive tokens (a power of two): int64 [windows, window - run + 1].

    Integer overflow wraps.
    """
    hashes, length = (windows.long() + 1) * 0x2545F4914F6CDD1D, 1
    while length < run:
        hashes = hashes[:, :-length] * 0x5851F42D4C957F2D + (hashes[:, length:] ^ (hashes[:, length:] >> 29))
        length *= 2
    return hashes


def overlap(first: torch.Tensor, second: torch.Tensor, run: int = _RUN) -> int:
    """Number of windows of ``second`` that share a run of ``run`` tokens with ``first``.

    ``run`` is lowered to the window length if necessary.
    """
    import torch

    run = 1 << (min(run, first.shape[1], second.shape[1]).bit_length() - 1)
    return int(torch.isin(_run_hashes(second, run), _run_hashes(first, run)).any(dim=1).sum())


def check_disjoint(
    calibration: torch.Tensor, evaluation: torch.Tensor, names: tuple[str, str] = PARTS, tolerance: float = 0.01
) -> int:
    """Refuse evaluation on calibration text; return the number of overlapping windows.

    Raises :class:`ConfigError` if more than ``tolerance`` of the windows overlap.
    """
    shared = overlap(calibration, evaluation)
    if shared > tolerance * len(evaluation):
        raise ConfigError(
            f"{shared} of {len(evaluation)} windows of corpus '{names[1]}' share text with corpus '{names[0]}': "
            "the evaluation would include calibration text; choose another split, part or file for one of them"
        )
    return shared
