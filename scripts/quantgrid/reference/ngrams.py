"""N-gram baselines on the training tokens: unigrams, and bigrams that back off to them."""

from __future__ import annotations

import torch
from torch import Tensor


class Ngrams:
    """Counts of ``windows`` [count, window] over ``vocabulary`` tokens; pairs are within
    windows."""

    def __init__(self, windows: Tensor, vocabulary: int):
        self.vocabulary = vocabulary
        first, second = windows[:, :-1].flatten(), windows[:, 1:].flatten()
        counts = torch.bincount(second, minlength=vocabulary).double() + 1
        self.frequencies = counts / counts.sum()
        self.pairs = torch.bincount(first * vocabulary + second, minlength=vocabulary**2)
        self.followed = torch.bincount(first, minlength=vocabulary)

    def unigram_loss(self, windows: Tensor) -> float:
        """Nats per token of ``windows`` [count, window] under the unigram frequencies.

        The first token of each window is not counted; each count has one added.
        """
        return -self.frequencies[windows[:, 1:]].log().mean().item()

    def bigram_loss(self, windows: Tensor, weight: float) -> float:
        """As :meth:`unigram_loss` for bigrams, p(b|a) = (count(ab) + ``weight`` p(b)) / (count(a) +
        ``weight``).

        The frequencies are a Dirichlet prior.
        """
        first, second = windows[:, :-1], windows[:, 1:]
        counts = self.pairs[first * self.vocabulary + second] + weight * self.frequencies[second]
        return -(counts / (self.followed[first] + weight)).log().mean().item()

    def best_weight(self, windows: Tensor) -> float:
        """Weight of least :meth:`bigram_loss` on ``windows``, of powers of two from 1 to 4096."""
        return min((2.0**power for power in range(13)), key=lambda weight: self.bigram_loss(windows, weight))
