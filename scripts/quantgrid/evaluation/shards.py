"""Merge of the shards of an evaluation: the losses of all windows, in their order. Standard library
only.

A shard is a result of ``evaluate_perplexity`` on some windows in whole batches. Batches do not
depend on each other, so that the merged losses have the bytes of one evaluation of all windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .protocols import of_perplexity
from .significance import perplexity

LOSSES = ("negative_log_likelihood", "kl_divergence")
_ABOUT = ("versions", "compute", "model")
_OF_SHARD = ("reference",)  # inputs that differ between the shards of an evaluation


def merged(shards: Sequence[Mapping[str, Any]], windows: int | None) -> dict[str, Any]:
    """Merge the ``shards`` of one evaluation on ``windows`` windows; None: all of the corpus.

    The evaluation fails with the reason of the first shard that failed.
    """
    first = shards[0]
    corpus = {**first["corpus"], "windows": first["corpus"]["windows"] if windows is None else windows}
    about = {
        **{name: first[name] for name in _ABOUT if name in first},
        "inputs": {name: digest for name, digest in first["inputs"].items() if name not in _OF_SHARD},
        "corpus": corpus,
        "protocol": of_perplexity(corpus, first["dtype"]),
    }
    if failed := next((shard for shard in shards if shard["status"] != "ok"), None):
        return {**about, "status": "failed", "reason": failed["reason"]}
    losses = joined(shards)
    value, error = perplexity(losses["negative_log_likelihood"])
    return {
        **about,
        "status": "ok",
        "perplexity": value,
        "stderr": error,
        "windows": losses,
        "attention": first["attention"],
    }


def joined(shards: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Losses by name (nats per predicted token), one per window of all ``shards``."""
    return {name: [value for shard in shards for value in shard["windows"][name]] for name in LOSSES}
