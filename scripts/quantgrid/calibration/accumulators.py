"""Running statistics of a site over the windows of a calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import LARGEST, SiteStatistics

BLOCK = 256  # rows of a second moment computed at a time


def site_name(layer: int, site: str) -> str:
    """Key of a site in the result of :func:`collect`."""
    return f"layers.{layer}.{site}"


class _Sample:
    """Token sample of a site: ``positions``, which include tokens at position 0, and the
    ``LARGEST`` by norm."""

    def __init__(self, positions: Tensor):
        self.positions, self.kept = positions, []
        self.norms, self.largest = torch.empty(0), None

    def add(self, x: Tensor, start: int) -> None:
        inside = self.positions[(self.positions >= start) & (self.positions < start + len(x))] - start
        self.kept.append(x[inside.to(x.device)])
        norms = torch.cat([self.norms.to(x), x.norm(dim=-1)])
        candidates = x if self.largest is None else torch.cat([self.largest, x])
        self.norms, order = norms.topk(min(LARGEST, len(norms)))
        self.largest = candidates[order].clone()

    def tokens(self) -> Tensor:
        return torch.cat([*self.kept, self.largest])


class Accumulator:
    """Running statistics of one site; ``add`` takes rows (tokens, n) in any float type."""

    def __init__(self, positions: Tensor):
        self.count, self.sample = 0, _Sample(positions)
        # the second moment on the diagonal and to its right
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.sample.add(x, self.count)
        self.count += len(x)
        low, high = x.aminmax(dim=0)
        if not self.sums:
            zero = torch.zeros_like(low, dtype=torch.float64)
            self.sums = {
                "mean": zero,
                "mean_absolute": zero.clone(),
                "second_moment": zero.new_zeros(len(zero), len(zero)),
            }
            self.extremes = {"minimum": low, "maximum": high}
        self.sums["mean"] += x.sum(0)
        self.sums["mean_absolute"] += x.abs().sum(0)
        for start in range(0, x.shape[-1], BLOCK):
            self.sums["second_moment"][start : start + BLOCK, start:] += x[:, start : start + BLOCK].mT @ x[:, start:]
        self.extremes = {
            "minimum": torch.minimum(self.extremes["minimum"], low),
            "maximum": torch.maximum(self.extremes["maximum"], high),
        }

    def result(self, device: torch.device | str = "cpu") -> SiteStatistics:
        """Statistics of all rows, on ``device``."""
        _mirror_(self.sums["second_moment"])
        means = {name: (total / self.count).to(device) for name, total in self.sums.items()}
        extremes = {name: value.double().to(device) for name, value in self.extremes.items()}
        return SiteStatistics(count=self.count, samples=self.sample.tokens().to(device), **means, **extremes)


def _mirror_(matrix: Tensor) -> None:
    """Mirror the upper triangle of a matrix (n, n) to the lower one, in place."""
    for start in range(0, len(matrix), BLOCK):
        end = start + BLOCK
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        matrix[end:, start:end] = matrix[start:end, end:].mT


def sample_positions(windows: int, window: int, samples: int, seed: int) -> Tensor:
    """Sorted sample positions in the concatenated windows.

    The sample has the first token of windows, in up to an eighth of the positions; ``seed`` draws
    the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(0, windows * window, window)[: max(1, samples // 8)]
    drawn = torch.randperm(windows * window, generator=generator)
    drawn = drawn[drawn % window != 0][: max(0, samples - len(first))]
    return torch.cat([first, drawn]).sort().values
