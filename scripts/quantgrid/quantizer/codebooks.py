"""Codebooks fitted to the scale blocks of a weight: seeded one-dimensional k-means.

Every block has 2**bits entries in units of its scale, so within about [-1, 1], stored as float16,
which is finer than any relevant distance between entries. On sorted values with prefix sums an
iteration of Lloyd's algorithm is a binary search: the mean of a cell is a difference of two sums.
Initial centres are drawn by k-means++ (Arthur and Vassilvitskii, 2007); of ``STARTS``
initializations the one of least squared error is kept. All blocks share the random draws, so the
codebook of a block depends only on that block and the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float16
STARTS = 4
_LARGEST_ITERATIONS = 200


def fit_codebooks(units: Tensor, entries: int, seed: int) -> Tensor:
    """Fit codebooks (rows, groups, ``entries``), ascending float16, to ``units``
    (rows, groups, size).

    ``units`` are x / step.
    """
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
        best, found = torch.where(better, explained, best), torch.where(better.unsqueeze(-1), centres, found)  # type: ignore[arg-type]
    largest = torch.finfo(DTYPE).max
    return found.clamp_(-largest, largest).to(DTYPE)  # type: ignore[union-attr]


def _plus_plus(values: Tensor, draws: list[float]) -> Tensor:
    """Draw initial centres (rows, groups, entries) by k-means++.

    Each is drawn from the values with probability proportional to the squared distance to its
    predecessors.
    """
    chosen = [values[..., int(draws[0] * values.shape[-1])].unsqueeze(-1)]
    distance = (values - chosen[0]).square()
    for draw in draws[1:]:
        running = distance.cumsum(-1)
        position = torch.searchsorted(running, draw * running[..., -1:], right=True).clamp_(max=values.shape[-1] - 1)
        chosen.append(values.gather(-1, position))
        distance = torch.minimum(distance, (values - chosen[-1]).square())
    return torch.cat(chosen, -1).sort(dim=-1).values


def _lloyd(values: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """Move centres to the mean of their cells until convergence; a centre with an empty cell
    stays."""
    for _ in range(_LARGEST_ITERATIONS):
        counts, totals = _cells(values, sums, centres)
        moved = torch.where(counts > 0, totals / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _cells(values: Tensor, sums: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Number of values nearest to each centre, and their sum; ties go to the lower centre."""
    middle = ((centres[..., 1:] + centres[..., :-1]) / 2).contiguous()
    inner = torch.searchsorted(values, middle, right=True)
    ends = inner.new_zeros(*inner.shape[:-1], 1)
    edges = torch.cat([ends, inner, ends + values.shape[-1]], -1)
    return edges.diff(dim=-1), sums.gather(-1, edges).diff(dim=-1)


def _explained(values: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """Share (rows, groups) of each block's sum of squares that its centres explain."""
    counts, totals = _cells(values, sums, centres)
    return (2 * totals * centres - counts * centres.square()).sum(-1)
