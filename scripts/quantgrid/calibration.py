"""Statistics of every site of an unmodified model, taken layer by layer from one set of token windows.

The hidden states of all windows move through one decoder layer at a time; while they do, hooks on the layer's linears add up
count, mean, second moment (float32 sums over one window, added in float64), extremes and a token sample of each site's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import SITES, ModelShape, linear_module
from .errors import ConfigError
from .statistics import SiteStatistics, to_tensors

LARGEST = 16  # tokens of largest norm kept in the sample of a site
BLOCK = 256  # rows of a second moment that are computed at a time


def site_name(layer: int, site: str) -> str:
    """Key of a site in what :func:`collect` returns."""
    return f"layers.{layer}.{site}"


class _Sample:
    """Tokens of a site: evenly spread ones, those at position 0 first, and the ``LARGEST`` by norm."""

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
        self.sums: dict[str, Tensor] = {}  # of the second moment what lies on the diagonal and to its right

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.sample.add(x, self.count)
        self.count += len(x)
        low, high = x.aminmax(dim=0)
        if not self.sums:
            zero = torch.zeros_like(low, dtype=torch.float64)
            self.sums = {"mean": zero, "mean_absolute": zero.clone(), "second_moment": zero.new_zeros(len(zero), len(zero))}
            self.extremes = {"minimum": low, "maximum": high}
        self.sums["mean"] += x.sum(0)
        self.sums["mean_absolute"] += x.abs().sum(0)
        for start in range(0, x.shape[-1], BLOCK):
            self.sums["second_moment"][start:start + BLOCK, start:] += x[:, start:start + BLOCK].mT @ x[:, start:]
        self.extremes = {"minimum": torch.minimum(self.extremes["minimum"], low), "maximum": torch.maximum(self.extremes["maximum"], high)}

    def result(self) -> SiteStatistics:
        _mirror_(self.sums["second_moment"])
        means = {name: (total / self.count).cpu() for name, total in self.sums.items()}
        extremes = {name: value.double().cpu() for name, value in self.extremes.items()}
        return SiteStatistics(count=self.count, samples=self.sample.tokens().cpu(), **means, **extremes)


def _mirror_(matrix: Tensor) -> None:
    """Make a matrix (n, n) symmetric whose part right of the diagonal is known."""
    for start in range(0, len(matrix), BLOCK):
        end = start + BLOCK
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        matrix[end:, start:end] = matrix[start:end, end:].mT


def sample_positions(windows: int, window: int, samples: int, seed: int) -> Tensor:
    """Sorted positions in the joined windows: the first token of up to an eighth as many windows, the rest drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(0, windows * window, window)[: max(1, samples // 8)]
    drawn = torch.randperm(windows * window, generator=generator)
    drawn = drawn[drawn % window != 0][: max(0, samples - len(first))]
    return torch.cat([first, drawn]).sort().values


class _Passage(nn.Module):
    """Stands in for a decoder layer, hands on what it is given, and remembers it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, {key: value for key, value in arguments.items() if key != "past_key_values"}
        return hidden_states


@contextmanager
def _passages(model: nn.Module) -> Iterator[list[_Passage]]:
    """``model`` with nothing but passages in the places of its decoder layers, whose weights need not be there."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(map(_Passage, layers.children()))
    try:
        yield list(model.model.layers)
    finally:
        model.model.layers = layers


def layer_inputs(model: nn.Module, windows: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states (windows, window, d) before the first decoder layer, and the keyword arguments of every layer.

    Masks and position embeddings depend on the window length alone; they are those of a forward pass of the first window, so that nothing is
    assumed about how an architecture builds them. No decoder layer runs.
    """
    with _passages(model) as passages:
        model.model(windows[:1], use_cache=False)
        arguments, first = [passage.arguments for passage in passages], passages[0].hidden
        hidden = first.new_empty(len(windows), *first.shape[1:])
        for row, window in enumerate(windows):
            model.model(window[None], use_cache=False)
            hidden[row] = passages[0].hidden[0]
    return hidden, arguments


def advance(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any], batch_size: int = 1) -> None:
    """Replace the hidden states (windows, window, d) that enter a decoder layer by those that leave it, ``batch_size`` windows at a time."""
    for rows in hidden.split(batch_size):
        output = layer(rows, **arguments)
        rows.copy_(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def collect_layers(model: nn.Module, tokens: Tensor, samples: int = 256, seed: int = 0, progress: Callable[[Iterable], Iterable] = iter,
                   skip_first: int = 0) -> Iterator[dict[str, SiteStatistics]]:
    """What :func:`collect` returns, one decoder layer after the other, as soon as it is known."""
    count, window = tokens.shape
    if skip_first >= window:
        raise ConfigError(f"skip_first {skip_first} leaves nothing of windows of {window} tokens")
    device = next(model.parameters()).device
    hidden, arguments = layer_inputs(model, tokens.to(device))
    positions = sample_positions(count, window - skip_first, samples, seed)
    for index, layer in zip(progress(range(len(arguments))), model.model.layers):
        accumulators = {site: Accumulator(positions) for site in SITES}
        handles = [layer.get_submodule(linear_module(linears[0])).register_forward_pre_hook(
            lambda _module, inputs, seen=accumulators[site]: seen.add(inputs[0][:, skip_first:])) for site, linears in SITES.items()]
        advance(layer, hidden, arguments[index])
        for handle in handles:
            handle.remove()
        yield {site_name(index, site): accumulators.pop(site).result() for site in SITES}


def collect(model: nn.Module, tokens: Tensor, samples: int = 256, seed: int = 0, progress: Callable[[Iterable], Iterable] = iter,
            skip_first: int = 0) -> dict[str, SiteStatistics]:
    """Statistics of every site of a transformers decoder.

    ``tokens`` (windows, window) of token ids; returns ``layers.{i}.{site}`` -> :class:`SiteStatistics` over all windows x (window -
    ``skip_first``) tokens: the first ones of every window are context and not counted. ``progress`` wraps the iteration over layers.
    """
    layers = collect_layers(model, tokens, samples, seed, progress, skip_first)
    return {name: statistics for layer in layers for name, statistics in layer.items()}


def kept_tensors(shape: ModelShape, tokens: Tensor, samples: int, seed: int, skip_first: int) -> dict[str, Tensor]:
    """What a file of the statistics that :func:`collect` would return holds, by name: tensors of that dtype and shape on the meta device."""
    count, window = len(tokens), tokens.shape[1] - skip_first
    rows = len(sample_positions(count, window, samples, seed)) + min(LARGEST, count * window)
    found: dict[str, Tensor] = {}
    for layer in range(shape.layers):
        for site in SITES:
            size = shape.site_size(site)
            vector = torch.empty(size, device="meta")
            moment, sample = (vector.expand(length, size) for length in (size, rows))
            found |= to_tensors(site_name(layer, site), SiteStatistics(count * window, vector, moment, vector, vector, vector, sample))
    return found
