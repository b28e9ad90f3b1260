"""Measurement protocols, a small dict in every row of the results; only equal protocols compare.

Perplexity: the corpus and the sha256 of its text, the join of its documents, window, stride and
choice of windows, normalization, BOS, and the dtype of the computation. Task: the task and its
version, metric, shots, the documents, the version of lm-eval, batch size (``auto``: and the tokens
that a batch may hold), dtype of the computation and of the log-probabilities. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ground.storage import read_json

OF_MODEL = (
    "tokenizer_sha256",
    "tokens",
    "windows",
    "bos_token_id",
)  # these may differ between models, not within one
SCORED_IN = "float32"  # dtype of the log-probabilities of tasks, whatever that of the model
_CORPUS = ("text_sha256", "join", "window", "stride", "windows", "selection", "tokens", "tokenizer_sha256")


def of_perplexity(corpus: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Protocol of a perplexity.

    ``corpus`` is the info of ``token_windows.tokenize``; ``dtype`` is that of the computation
    (``float32``). ``stride`` counts tokens of text from window to window; ``normalization`` is per
    token (the mean over predicted tokens), never per word.
    """
    bos = bool(corpus.get("add_bos"))
    name = f"token perplexity, windows of {corpus.get('window')}{', BOS' if bos else ''}"
    found = {"name": name, "corpus": corpus.get("corpus"), "normalization": "token", "bos": bos, "dtype": dtype}
    found |= {key: corpus.get(key) for key in _CORPUS}
    if bos:
        found["bos_token_id"] = corpus.get("bos_token_id")
    if corpus.get("selection") == "random":
        found["seed"] = corpus.get("seed")
    if corpus.get("skip_windows"):
        found["skip_windows"] = corpus["skip_windows"]
    return found


def of_task(result: Mapping[str, Any], batch_size: int | str, limit: int | None, dtype: str) -> dict[str, Any]:
    """Protocol of a zero-shot task from its result (``tasks.evaluate``) and its settings."""
    keys = ("task", "source", "version", "metric", "shots", "documents_sha256", "lm_eval")
    found = {key: result.get(key) for key in keys} | {"batch_size": batch_size, "limit": limit}
    found |= {"batch_tokens": result["batch_tokens"]} if "batch_tokens" in result else {}
    found |= {"dtype": dtype, "scored_in": SCORED_IN}
    return {"name": f"{result.get('task')}, {result.get('metric')}, {result.get('shots')}-shot", **found}


def of_mean(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Protocol of a mean over tasks: the protocols of the tasks by name."""
    return {"name": f"mean of {', '.join(protocols)}", "tasks": dict(protocols)}


def weights_of(model: str | Path) -> dict[str, Any]:
    """Identity of the weights in a canonical model folder.

    ``weights_sha256`` {file: digest} and, for a hub model, the ``commit``.
    """
    provenance = read_json(Path(model) / "provenance.json")
    return {key: provenance[key] for key in ("weights_sha256", "commit") if key in provenance}


def differences(one: str, other: str, same_model: bool = True) -> list[str]:
    """Differences of two protocols, one text per key: ``window 2048 / 4096``.

    Protocols are canonical JSON, empty if none was recorded. Between models, keys that depend on
    the tokenizer are ignored.
    """
    if one == other:
        return []
    if not one or not other:
        return ["a protocol that only one of the two has recorded"]
    first, second = (flat(json.loads(text)) for text in (one, other))
    ignored = {"name"} if same_model else {"name", *OF_MODEL}
    keys = [key for key in dict.fromkeys([*first, *second]) if key.rpartition(".")[2] not in ignored]
    return [f"{key} {first.get(key)!r} / {second.get(key)!r}" for key in keys if first.get(key) != second.get(key)]


def flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested dicts, joining keys with dots."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def described(text: str) -> str:
    """Protocol of a row in one readable line."""
    content = {key: value for key, value in flat(json.loads(text)).items() if key != "name" and value is not None}
    return "; ".join(f"{key} {value!r}" if key == "join" else f"{key} {value}" for key, value in content.items())
