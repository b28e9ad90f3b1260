"""Text to calibrate on and to measure perplexity on, from four sources, as windows of tokens.

``library_docs``  docstrings of the pinned libraries: {part: calibration | evaluation}; the same text on every machine (:mod:`.library_docs`).
``builtin``  CPython's own ``pydoc_data.topics``: {part: calibration | evaluation}; needs nothing but Python, and varies with its version.
``local``    a file: {path, format: text | jsonl | parquet (else from the suffix), field: text}.
``hub``      a dataset: {id, name, split, field, revision, data_files, documents: first so many, streamed}, through ``datasets``.

The documents are joined by ``join`` (a blank line), tokenized as one stream and cut into ``windows`` windows of ``window`` tokens that never
overlap, as the perplexity protocol of GPTQ (arXiv 2210.17323) and of the paper does. Keys of every entry: source, join, window, windows
(absent: all there are), selection (sequential | random), add_bos.
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
from .errors import ConfigError, unknown_name
from .library_docs import PARTS, unrepeated
from .storage import read_json, read_metadata, read_tensors, sha256_of, write_tensors

if TYPE_CHECKING:
    import torch

SELECTIONS = ("sequential", "random")
_FORMATS = {".txt": "text", ".raw": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_RUN = 64  # tokens: so long a run in two corpora is the same text, not chance


def read(entry: Mapping[str, Any], where: str = "corpus") -> list[str]:
    """The documents of a corpus entry, in their order. ``where`` is the config key that messages name; raises :class:`ConfigError`."""
    sources = {"library_docs": _read_library_docs, "builtin": _read_builtin, "local": _read_local, "hub": _read_hub}
    if entry.get("source") not in sources:
        raise ConfigError(f"{where}.source: {unknown_name('source', entry.get('source'), sources)}")
    documents = sources[entry["source"]](entry, where)  # blank rows too: the usual protocol joins the rows of a data set as they are
    if not any(text.strip() for text in documents):
        raise ConfigError(f"{where}: holds no text")
    return documents


def join(entry: Mapping[str, Any], documents: list[str]) -> str:
    """One text: the documents with ``entry['join']`` (default: a blank line) between them."""
    return entry.get("join", "\n\n").join(documents)


def _read_builtin(entry: Mapping[str, Any], where: str) -> list[str]:
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
    return kept[entry["part"]]


def _read_library_docs(entry: Mapping[str, Any], where: str) -> list[str]:
    _check_part(entry, where)
    return library_docs.documents(entry["part"])


def _check_part(entry: Mapping[str, Any], where: str) -> None:
    if entry.get("part") not in PARTS:
        raise ConfigError(f"{where}.part: {unknown_name('part', entry.get('part'), PARTS)}")


def _read_local(entry: Mapping[str, Any], where: str) -> list[str]:
    path = Path(entry.get("path") or "").expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}.path: {path}: no such file")
    form = entry.get("format") or _FORMATS.get(path.suffix.lower())
    readers = {"text": lambda: [path.read_bytes().decode()], "jsonl": lambda: _read_jsonl(path, entry.get("field", "text")),
               "parquet": lambda: _read_parquet(path, entry.get("field", "text"))}
    if form not in readers:
        raise ConfigError(f"{where}.format: {unknown_name('format', form or path.suffix, readers)}")
    try:
        return readers[form]()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}.path: {path}: not UTF-8 text ({error})") from None


def _read_jsonl(path: Path, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(path.read_bytes().decode().split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            documents.append(str(record[field]))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not a JSON line ({error})") from None
        except (KeyError, TypeError):
            has = ", ".join(record) if isinstance(record, dict) else "no object"
            raise ConfigError(f"{path}:{number}: no field '{field}' (has: {has}); name the text's field with 'field:'") from None
    return documents


def _read_parquet(path: Path, field: str) -> list[str]:
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
    except Exception as error:  # pyarrow raises several unrelated kinds for a broken file
        raise ConfigError(f"{path}: not a parquet file ({error})") from None
    if field not in names:
        raise ConfigError(f"{path}: no column '{field}' (has: {', '.join(names)}); name the text's column with 'field:'")
    return [text or "" for text in parquet.read_table(path, columns=[field])[field].to_pylist()]


def _read_hub(entry: Mapping[str, Any], where: str) -> list[str]:
    from datasets import load_dataset

    count, field = entry.get("documents"), entry.get("field", "text")
    try:
        dataset = load_dataset(entry["id"], entry.get("name"), split=entry.get("split", "train"), revision=entry.get("revision"),
                               data_files=entry.get("data_files"), streaming=count is not None)
        rows = dataset.take(count) if count is not None else dataset
        return [row[field] for row in rows]
    except KeyError as missing:
        raise ConfigError(f"{where}: no {missing}; a hub corpus needs 'id', and 'field' names the column of the text") from None
    except Exception as error:  # the hub, the file formats and the network each have their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{where}: dataset '{entry['id']}' cannot be read: {reason} (gated: accept its licence on its hub page and "
                          "run `hf auth login`; offline: use source: local or builtin)") from None


def encode(text: str, folder: str | Path) -> list[int]:
    """Token ids of ``text`` by the tokenizer in ``folder``, with no special token added."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():  # a sentencepiece model only: transformers converts it
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text, add_special_tokens=False)["input_ids"]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def bos_token(folder: str | Path, where: str = "corpus") -> int:
    """Id of the token that begins a sequence, from tokenizer_config.json and config.json; :class:`ConfigError` if there is none."""
    files = [Path(folder) / "tokenizer_config.json", Path(folder) / "config.json"]
    settings, config = (read_json(file) if file.is_file() else {} for file in files)
    token = settings.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token and (Path(folder) / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        identifier = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).token_to_id(token)
    else:
        identifier = config.get("bos_token_id")
    if not isinstance(identifier, int):
        raise ConfigError(f"{where}.add_bos: the tokenizer in {folder} has no token that begins a sequence; use add_bos: false")
    return identifier


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


def tokenize(entry: Mapping[str, Any], tokenizer_folder: str | Path, seed: int = 0, where: str = "corpus") -> tuple[torch.Tensor, dict[str, Any]]:
    """The corpus of ``entry`` as (windows, info): int64 [windows, window], and what made them (JSON: checksums, counts, options).

    With ``add_bos`` each window begins with the BOS token and holds window - 1 tokens of text. Raises :class:`ConfigError` for unreadable
    sources and for a corpus too short.
    """
    import torch

    documents = read(entry, where)
    text = join(entry, documents)
    ids = encode(text, tokenizer_folder)
    bos = bos_token(tokenizer_folder, where) if entry.get("add_bos") else None
    window, selection = entry.get("window", 2048), entry.get("selection", "sequential")
    stride = window - (bos is not None) if isinstance(window, int) else window
    begins = starts(len(ids), stride, entry.get("windows"), selection, seed, where)
    stream = torch.tensor(ids, dtype=torch.int64)
    windows = torch.stack([stream[begin:begin + stride] for begin in begins])
    if bos is not None:
        windows = torch.cat([torch.full((len(begins), 1), bos), windows], dim=1)
    options = {key: entry[key] for key in ("source", "part", "path", "id", "name", "split", "field", "revision") if entry.get(key) is not None}
    info = {**options, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "documents": len(documents), "characters": len(text),
            "join": entry.get("join", "\n\n"), "tokens": len(ids), "windows": len(begins), "window": window, "stride": stride,
            "selection": selection, "seed": seed, "add_bos": bos is not None, "bos_token_id": bos,
            "tokenizer_sha256": _tokenizer_sha256(tokenizer_folder)}
    if entry["source"] == "builtin":
        info["python"] = platform.python_version()
    return windows, info


def _tokenizer_sha256(folder: str | Path) -> str | None:
    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer.model")]
    return next((sha256_of(file) for file in files if file.is_file()), None)


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
