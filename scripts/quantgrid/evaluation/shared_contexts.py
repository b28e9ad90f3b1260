"""Log-likelihoods of continuations, with every context computed once.

Continuations of one context stand one after another in a single row of tokens. The positions of each
begin behind the context, and the attention mask hides the others from it, so that every token has the
activations that it has in a row alone. lm-eval's own scorer computes the context again for every
continuation, and the logits of all tokens rather than those of the continuations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.linear import Rounding
from ..models.lm_head import Head, head_of

LONGEST_ROW = 1024  # tokens of a row with several continuations
LARGEST_MASK = 1 << 25  # entries of the mask of a batch
Tokens = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]  # tokens of the context, tokens to score


@dataclass
class Item:
    """One context with its different continuations, and the requests that each answers."""

    context: Tokens
    asked: dict[Tokens, list[int]] = field(default_factory=dict)

    def has_room(self, continuation: Tokens) -> bool:
        """Check whether another continuation fits into the row; one token takes no place."""
        added = len(continuation) - 1
        return not added or self.length + added <= max(LONGEST_ROW, 2 * len(self.context))

    @property
    def length(self) -> int:
        """Tokens of the row: the last token of a continuation predicts nothing."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.asked)

    @property
    def span(self) -> int:
        """Largest position of a token, plus one."""
        return len(self.context) + max(len(continuation) for continuation in self.asked) - 1


def items_of(requests: Sequence[Request], max_length: int) -> list[Item]:
    """Group ``requests`` by context, equal ones together.

    A request longer than ``max_length`` + 1 loses the beginning of its context, as in lm-eval. A row
    ends at ``LONGEST_ROW`` tokens, or at twice its context; further continuations get rows of their
    context again.
    """
    found: list[Item] = []
    last: dict[Tokens, Item] = {}
    places: dict[tuple[Tokens, Tokens], Item] = {}
    for number, (context, continuation) in enumerate(requests):
        kept, scored = tuple(context)[-(max_length + 1 - len(continuation)) :], tuple(continuation)
        item = places.get((kept, scored)) or last.get(kept)
        if item is None or (scored not in item.asked and not item.has_room(scored)):
            item = last[kept] = Item(kept)
            found.append(item)
        places[kept, scored] = item
        item.asked.setdefault(scored, []).append(number)
    return found


def batches(items: Sequence[Item], size: float, tokens: float = math.inf) -> Iterator[list[Item]]:
    """Yield ``items`` by falling length, ``size`` at a time, or as many as ``LARGEST_MASK`` and
    ``tokens`` with padding allow."""
    ordered = sorted(items, key=lambda item: -item.length)
    start = 0
    while start < len(ordered):
        length = ordered[start].length
        count = int(min(size, max(1, min(LARGEST_MASK // length**2, tokens // length)), len(ordered)))
        yield ordered[start : start + count]
        start += count


def rounds_tokens_alone(model: nn.Module) -> bool:
    """Check whether no activation of ``model`` has one scale for all tokens of a row."""
    return all(
        module.scheme.rows_are_independent or "scale" in module.fixed or "global_scale" in module.fixed
        for module in model.modules()
        if isinstance(module, Rounding)
    )


def longest_span(config: Any) -> float:
    """Positions up to which a token of a shared row is computed as in a row alone.

    Beyond a sliding window the mask of a shared row is another one, and ``longrope`` chooses its
    frequencies by the largest position of a batch. Linear attention has no mask: its state would carry
    one continuation into the next.
    """
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        return 0
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    original = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([math.inf, *filter(None, [window, *original])])


@torch.no_grad()
def score(model: nn.Module, items: Sequence[Item]) -> list[tuple[int, float, bool]]:
    """(request, sum of log-probabilities of the continuation, whether each of its tokens is the
    likeliest), for one batch of ``items``."""
    width = max(item.length for item in items)
    tokens, positions = (torch.zeros(len(items), width, dtype=torch.int64) for _ in range(2))
    for number, item in enumerate(items):
        own, places = _row(item)
        tokens[number, : len(own)], positions[number, : len(own)] = torch.tensor(own), torch.tensor(places)
    # without branches the rows are causal, and what pads them is behind all that is read
    branched = any(sum(len(continuation) > 1 for continuation in item.asked) > 1 for item in items)
    mask = _mask(items, width, model.dtype).to(model.device) if branched else None
    hidden = model.model(
        input_ids=tokens.to(model.device),
        position_ids=positions.to(model.device) if branched else None,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    head, found = head_of(model), []
    for item, states in zip(items, hidden):
        found += _answers(item, states, head)
    return found


def _row(item: Item) -> tuple[list[int], list[int]]:
    """Tokens and positions of one item."""
    begin = len(item.context)
    tokens, places = list(item.context), list(range(begin))
    for continuation in item.asked:
        tokens += continuation[:-1]
        places += range(begin, begin + len(continuation) - 1)
    return tokens, places


def _mask(items: Sequence[Item], width: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (items, 1, width, width) that hides continuations from one another."""
    mask = torch.full((width, width), torch.finfo(dtype).min, dtype=dtype).triu_(1).repeat(len(items), 1, 1)
    for number, item in enumerate(items):
        start = begin = len(item.context)
        for continuation in item.asked:
            own = len(continuation) - 1
            mask[number, start : start + own, begin:start] = torch.finfo(dtype).min
            start += own
    return mask.unsqueeze(1)


def _answers(item: Item, states: Tensor, head: Head) -> Iterator[tuple[int, float, bool]]:
    """Answers of one item from the final hidden ``states`` (length, d) of its row."""
    begin, start = len(item.context), len(item.context)
    predicting, targets = [], []
    for continuation in item.asked:
        own = len(continuation) - 1
        predicting += [begin - 1, *range(start, start + own)]
        targets += continuation
        start += own
    logits = head(states[torch.tensor(predicting).to(states.device)])
    target = torch.tensor(targets).to(states.device)
    chosen = logits.float().log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    likeliest = logits.argmax(-1) == target
    sizes = [len(continuation) for continuation in item.asked]
    for numbers, logs, best in zip(item.asked.values(), chosen.split(sizes), likeliest.split(sizes)):
        yield from ((number, float(logs.sum()), bool(best.all())) for number in numbers)
