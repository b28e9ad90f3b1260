"""Log-likelihoods of continuations, with every context computed once.

Continuations of one context stand one after another in a single row of tokens. The positions of each
begin behind the context, and the attention mask hides the others from it, so that every token has the
activations that it has in a row alone. lm-eval's own scorer computes the context again for every
continuation, and the logits of all tokens rather than those of the continuations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..inference.linear import Rounding
from ..models.lm_head import Head, head_of

Tokens = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]  # tokens of the context, tokens to score


@dataclass
class Item:
    """One context with its different continuations, and the requests that each answers."""

    context: Tokens
    asked: dict[Tokens, list[int]] = field(default_factory=dict)

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

    A request longer than ``max_length`` + 1 loses the beginning of its context, as in lm-eval.
    """
    found: dict[Tokens, Item] = {}
    for number, (context, continuation) in enumerate(requests):
        kept = tuple(context)[-(max_length + 1 - len(continuation)) :]
        item = found.setdefault(kept, Item(kept))
        item.asked.setdefault(tuple(continuation), []).append(number)
    return list(found.values())


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Yield ``items`` by falling length, ``size`` at a time."""
    ordered = sorted(items, key=lambda item: -item.length)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def takes_rows(model: nn.Module, span: int) -> bool:
    """Check whether ``model`` computes a token of a shared row as in a row alone.

    It does unless an activation has one scale for all tokens of a row, or ``span`` positions exceed
    a sliding window, which the mask of a shared row does not have.
    """
    window = getattr(model.config, "sliding_window", None)
    used = getattr(model.config, "use_sliding_window", True)
    if window and used and span > window:
        return False
    return all(
        module.scheme.rows_are_independent or "scale" in module.fixed or "global_scale" in module.fixed
        for module in model.modules()
        if isinstance(module, Rounding)
    )


@torch.no_grad()
def score(model: nn.Module, items: Sequence[Item]) -> list[tuple[int, float, bool]]:
    """(request, sum of log-probabilities of the continuation, whether each of its tokens is the
    likeliest), for one batch of ``items``."""
    rows = [_row(item) for item in items]
    width = max(len(tokens) for tokens, _, _ in rows)
    tokens, positions = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    visible = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, (own, places, mask) in enumerate(rows):
        tokens[number, : len(own)], positions[number, : len(own)] = torch.tensor(own), torch.tensor(places)
        visible[number, : len(own), : len(own)] = mask
    device, dtype = model.device, model.dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
    hidden = model.model(
        input_ids=tokens.to(device), position_ids=positions.to(device), attention_mask=mask.to(device), use_cache=False
    ).last_hidden_state
    head, found = head_of(model), []
    for item, states in zip(items, hidden):
        found += _answers(item, states, head)
    return found


def _row(item: Item) -> tuple[list[int], list[int], Tensor]:
    """Tokens, positions and visible tokens (length, length) of one item."""
    begin, length = len(item.context), item.length
    tokens, places = list(item.context), list(range(begin))
    visible = torch.ones(length, length, dtype=torch.bool).tril_()
    for continuation in item.asked:
        start, own = len(tokens), len(continuation) - 1
        tokens += continuation[:-1]
        places += range(begin, begin + own)
        visible[start : start + own, begin:start] = False
    return tokens, places, visible


def _answers(item: Item, states: Tensor, head: Head) -> Iterator[tuple[int, float, bool]]:
    """Answers of one item from the final hidden ``states`` (length, d) of its row."""
    begin, start = len(item.context), len(item.context)
    predicting, targets = [], []
    for continuation in item.asked:
        own = len(continuation) - 1
        predicting += [begin - 1, *range(start, start + own)]
        targets += continuation
        start += own
    logits = head(states[torch.tensor(predicting, device=states.device)])
    target = torch.tensor(targets, device=states.device)
    chosen = logits.float().log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    likeliest = logits.argmax(-1) == target
    sizes = [len(continuation) for continuation in item.asked]
    for numbers, logs, best in zip(item.asked.values(), chosen.split(sizes), likeliest.split(sizes)):
        yield from ((number, float(logs.sum()), bool(best.all())) for number in numbers)
