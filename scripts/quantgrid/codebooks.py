"""Codebooks fitted to the scale blocks of a weight: seeded k-means in one dimension.

Every block has 2**bits entries, in units of its scale and therefore within about [-1, 1], stored as float16: finer than any distance
between neighbours that matters. Values in order and their running sums make an iteration of Lloyd's algorithm a binary search: the
mean of a cell is a difference of two sums. Starts are drawn by k-means++ (Arthur and Vassilvitskii, 2007); of ``STARTS`` the one of
least squared error wins. All blocks share the draws, so that the codebook of a block depends on that block and the seed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float16
STARTS = 4
_LARGEST_ITERATIONS = 200


def fit_codebooks(units: Tensor, entries: int, seed: int) -> Tensor:
    """Codebooks (rows, groups, ``entries``), ascending float16, of ``units`` (rows, groups, size) = x / step."""
    if not units.shape[-1]:
        return units.new_zeros(*units.shape[:-1], entries, dtype=DTYPE)
    values = units.double().sort(dim=-1).values.contiguous()
    sums = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    draws = torch.rand(STARTS, entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    best = found = None
    for start in draws:
        centres = _lloyd(values, sums, _plus_plus(values, start))
        explained = _explained(values, sums, centres)
        if best is None:
            best, found = explained, centres
        better = explained > best
        best, found = torch.where(better, explained, best), torch.where(better.unsqueeze(-1), centres, found)
    largest = torch.finfo(DTYPE).max
    return found.clamp_(-largest, largest).to(DTYPE)


def _plus_plus(values: Tensor, draws: list[float]) -> Tensor:
    """Starting centres (rows, groups, entries): each drawn from the values in proportion to the squared distance to those before it."""
    chosen = [values[..., int(draws[0] * values.shape[-1])].unsqueeze(-1)]
    distance = (values - chosen[0]).square()
    for draw in draws[1:]:
        running = distance.cumsum(-1)
        position = torch.searchsorted(running, draw * running[..., -1:], right=True).clamp_(max=values.shape[-1] - 1)
        chosen.append(values.gather(-1, position))
        distance = torch.minimum(distance, (values - chosen[-1]).square())
    return torch.cat(chosen, -1).sort(dim=-1).values


def _lloyd(values: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """Centres moved to the mean of their cells until none moves; one whose cell is empty stays."""
    for _ in range(_LARGEST_ITERATIONS):
        counts, totals = _cells(values, sums, centres)
        moved = torch.where(counts > 0, totals / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _cells(values: Tensor, sums: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """How many values lie nearest to each centre, and their sum; halfway between two they belong to the lower one."""
    middle = ((centres[..., 1:] + centres[..., :-1]) / 2).contiguous()
    inner = torch.searchsorted(values, middle, right=True)
    ends = inner.new_zeros(*inner.shape[:-1], 1)
    edges = torch.cat([ends, inner, ends + values.shape[-1]], -1)
    return edges.diff(dim=-1), sums.gather(-1, edges).diff(dim=-1)


def _explained(values: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """The part (rows, groups) of each block's sum of squares that its centres account for."""
    counts, totals = _cells(values, sums, centres)
    return (2 * totals * centres - counts * centres.square()).sum(-1)
