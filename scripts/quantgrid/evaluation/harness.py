"""lm-eval's HFLM scorer with checks of the tokens of every request, and contexts computed once.

Import it only in jobs that score tasks: lm-eval takes seconds.
"""

from __future__ import annotations

import math
from typing import Any

from lm_eval.models.huggingface import HFLM

from ..ground.errors import ConfigError
from ..machine.chunks import UNSHARED_TOKENS
from .shared_contexts import batches, items_of, longest_span, rounds_tokens_alone, score

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, answer), their tokens


class Harness(HFLM):
    """HFLM that refuses tokens beyond the embedding and counts truncated requests.

    ``truncated`` counts requests longer than the model's positions: as in lm-eval, their contexts
    lose the beginning. A batch holds ``batch_size`` contexts, or with ``tokens`` as many as fit in them.
    """

    truncated = 0

    def __init__(self, *, tokens: int | None = None, **options: Any):
        super().__init__(**options)
        self.tokens = tokens

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        for texts, before, scored in requests:
            self._check(f"{texts[0][-40:]!r} + {texts[1][:40]!r}", before, scored)
        self.truncated += sum(len(before) + len(scored) > self.max_length + 1 for _, before, scored in requests)
        items = items_of([(before, scored) for _, before, scored in requests], self.max_length)
        longest = longest_span(self.model.config) if rounds_tokens_alone(self.model) else 0
        shared = [item for item in items if item.span <= longest]
        found: dict[int, tuple[float, bool]] = {}
        limits = (self.batch_size, math.inf) if self.tokens is None else (math.inf, self.tokens)
        for batch in batches(shared, *limits):
            found |= {number: (value, greedy) for number, value, greedy in score(self.model, batch)}
        alone = [number for number in range(len(requests)) if number not in found]
        if alone and self.tokens is not None:
            longest = max(len(requests[number][1]) + len(requests[number][2]) for number in alone)
            self.batch_size_per_gpu = max(1, UNSHARED_TOKENS // longest)
        scores = super()._loglikelihood_tokens([requests[number] for number in alone], **options) if alone else []
        found |= dict(zip(alone, scores))
        return [found[number] for number in range(len(requests))]

    def _check(self, about: str, before: list[int], scored: list[int]) -> None:
        if not before or not scored or None in before:
            lacking = "to score" if before else "before those that are scored"
            raise ConfigError(f"{about} has no tokens {lacking} by this model's tokenizer")
        rows, largest = self.model.get_input_embeddings().weight.shape[0], max([*before, *scored])
        if largest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ConfigError(
                f"{about} holds the token {token!r} with id {largest}, but the embedding has {rows} "
                f"rows and the tokenizer {len(self.tokenizer)} tokens"
            )
        if len(scored) > self.max_length:
            raise ConfigError(
                f"{about} has {len(scored)} tokens to score, more than the {self.max_length} positions of the model"
            )
