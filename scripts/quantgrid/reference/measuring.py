"""Measurements for the card of a reference model: held-out perplexity, activations, samples.

N-gram models provide the baseline perplexity.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..calibration.collect import collect
from ..calibration.streaming import FullPrecision, streamed
from ..corpora import token_windows
from ..evaluation.perplexity import final_hidden, window_losses
from ..models.lm_head import head_of
from ..models.plans import SITES, kind_of
from ..quantization.distributions import measures
from .ngrams import Ngrams

PROMPTS = ("Compute the eigenvalues of", "Parameters\n----------\nx : array_like\n", "Return True if")
_NEW_TOKENS = 60
_CALIBRATION_WINDOWS = 16


def load(folder: Path) -> nn.Module:
    """Load a folder through transformers in float32, whatever the stored dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def part(name: str, tokenizer: Path, window: int) -> Tensor:
    """All windows of a held-out part: int64 [count, window]."""
    return token_windows.tokenize({"source": "library_docs", "part": name, "window": window}, tokenizer)[0]


def loss_of_model(model: nn.Module, windows: Tensor) -> float:
    """Loss of a model on ``windows`` [count, window], in nats per predicted token."""
    losses = [
        window_losses(hidden, head_of(model), tokens)[0]
        for some in windows.split(8)
        for hidden, tokens in zip(final_hidden(model, some, 8), some, strict=True)
    ]
    return math.fsum(losses) / len(losses)


def bytes_per_token(tokenizer: Path, windows: Tensor) -> float:
    """Mean bytes per predicted token of ``windows``.

    The entries of a byte-level BPE have one character per byte.
    """
    entries = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    lengths = torch.tensor(
        [len(entries.id_to_token(token)) for token in range(entries.get_vocab_size())], dtype=torch.float64
    )
    return lengths[windows[:, 1:]].mean().item()


def losses(model: nn.Module, folder: Path, seen: Tensor, text: Tensor) -> dict[str, float]:
    """Nats per token of the evaluation part, and ``bytes_per_token``.

    Losses are those of the model and of n-grams trained on ``seen`` (its training tokens) and on
    the whole ``text``, both windows [count, window].
    """
    evaluation, calibration = (part(name, folder, text.shape[1]) for name in ("evaluation", "calibration"))
    found = {"model": loss_of_model(model, evaluation)}
    for counted, windows in (("seen", seen), ("text", text)):
        ngrams = Ngrams(windows, len(model.lm_head.weight))
        found[f"{counted} bigrams"] = ngrams.bigram_loss(evaluation, ngrams.best_weight(calibration))
        found[f"{counted} frequencies"] = ngrams.unigram_loss(evaluation)
    return {**found, "windows": len(evaluation), "bytes_per_token": bytes_per_token(folder, evaluation)}


def activations(folder: Path, windows: Tensor) -> dict[str, dict[str, float]]:
    """Activation statistics by kind of site: median and largest value over layers and experts.

    The values are kurtosis and the ratio of the largest to the median channel, on 256 calibration
    tokens.
    """
    kinds: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for name, statistics in collect(streamed(FullPrecision(folder)), windows[:_CALIBRATION_WINDOWS]).items():
        kinds[kind_of(name.split(".", 2)[2])].append(statistics.samples.double())
    table = {}
    for site, samples in kinds.items():
        seen = [measures(tokens, 1) for tokens in samples]
        table[site] = {
            f"{which.__name__} {name}": which(one[name] for one in seen)
            for name in ("kurtosis", "peak_to_median")
            for which in (median, max)
        }
    return table


@torch.no_grad()
def samples(model: nn.Module, tokenizer: Path) -> dict[str, str]:
    """Prompt -> greedy continuation by the model."""
    entries, found = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), {}
    for prompt in PROMPTS:
        ids = [0, *entries.encode(prompt).ids]
        begun = len(ids)
        for _ in range(_NEW_TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found[prompt] = entries.decode(ids[begun:])
    return found
