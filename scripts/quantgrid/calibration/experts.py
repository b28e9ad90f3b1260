"""Statistics of the inputs of routed experts, one expert at a time.

The tokens of all windows before the experts of a layer are kept with the router's choices. Then each
expert computes the input of its down projection for its own tokens, so that one second moment is in
memory at a time, never those of all experts of a layer.

An expert sees few tokens: N of them for n channels give a second moment of rank N at most, which a
mitigation would trust too much. It is shrunk to its own diagonal, C = (1 - l) C + l diag(C) with
l = n / (n + N). An expert without tokens gets the identity, i.e. rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.storage import open_tensors
from ..models.shapes import ModelShape
from .accumulators import Accumulator, site_name
from .statistics import LARGEST, SiteStatistics, count_in_file


def shrunk(statistics: SiteStatistics) -> SiteStatistics:
    """``statistics`` with a second moment that is shrunk to its diagonal, with weight n / (n + N)."""
    moment = statistics.second_moment
    if statistics.count == 0:
        return replace(
            statistics, memory={}, second_moment=torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        )
    weight = len(moment) / (len(moment) + statistics.count)
    return replace(statistics, memory={}, second_moment=moment.lerp(torch.diag(moment.diagonal()), weight))


def unseen(size: int, rows: int) -> SiteStatistics:
    """Statistics of ``size`` channels of an expert without tokens, with a sample of ``rows`` zeros."""
    zero = torch.zeros(size, dtype=torch.float64)
    return shrunk(SiteStatistics(0, zero, zero.new_zeros(size, size), zero, zero, zero, torch.zeros(rows, size)))


def expert_rows(samples: int) -> int:
    """Tokens in the sample of an expert, whatever number it saw."""
    return samples + LARGEST


def expert_tokens(shape: ModelShape, path: str | Path | None) -> dict[str, float]:
    """Calibration tokens of the routed experts in the statistics file ``path``; empty without experts or file.

    ``expert_tokens_smallest`` and ``expert_tokens_median``: N / n over all experts of all layers, N tokens
    for n input channels of a down projection. ``experts_below_width``: share of experts with N < n.
    """
    sites = [(layer, site) for layer in range(shape.layers) for site in shape.plan(layer).expert_sites]
    if path is None or not sites:
        return {}
    with open_tensors(path) as file:
        ratios = [count_in_file(file, site_name(layer, site)) / shape.site_size(site) for layer, site in sites]
    below = sum(ratio < 1 for ratio in ratios) / len(ratios)
    return {
        "expert_tokens_smallest": min(ratios),
        "expert_tokens_median": median(ratios),
        "experts_below_width": below,
    }


class Routed:
    """Tokens before the experts of one layer and the router's choices, recorded while the layer runs."""

    def __init__(self, experts: nn.ModuleList, skip_first: int, window: int):
        self.experts, self.skip_first, self.window = experts, skip_first, window
        self.hidden: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self.handle = experts.register_forward_pre_hook(self._record)

    def _record(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, chosen = (
            part.reshape(-1, self.window, part.shape[-1])[:, self.skip_first :].flatten(0, 1) for part in inputs[:2]
        )
        self.hidden.append(hidden.clone())
        self.chosen.append(chosen.clone())

    def tokens_of(self, expert: int) -> list[Tensor]:
        """Tokens [(tokens, d)] that the router sent to ``expert``."""
        return [hidden[(chosen == expert).any(-1)] for hidden, chosen in zip(self.hidden, self.chosen)]

    def statistics(self, layer: int, samples: int, seed: int, everyone: bool) -> Iterator[dict[str, SiteStatistics]]:
        """Yield the statistics of one expert after the other, shrunk, by the name of its site.

        ``everyone``: over all tokens instead of those that the router sends to the expert.
        """
        self.handle.remove()
        for number, expert in enumerate(self.experts):
            seen = self.hidden if everyone else self.tokens_of(number)
            yield {site_name(layer, f"down_input.{number}"): _of_expert(expert, seen, samples, seed + number)}


def _of_expert(expert: nn.Module, seen: list[Tensor], samples: int, seed: int) -> SiteStatistics:
    """Statistics of the input of the down projection of ``expert`` for tokens [(tokens, d)]."""
    total = sum(map(len, seen))
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    accumulator = Accumulator(drawn)
    for tokens in seen:
        if len(tokens):
            accumulator.add(expert.inner(tokens))
    size, rows = expert.down_proj.in_features, expert_rows(samples)
    if not total:
        return unseen(size, rows)
    found = accumulator.result()
    again = torch.arange(rows) % len(found.samples)  # a fixed number of rows: few tokens repeat
    return shrunk(replace(found, samples=found.samples[again]))
