"""Statistics of every site of an unmodified model, taken layer by layer from one set of token windows.

The hidden states of all windows move through one decoder layer at a time; while they do, hooks on the layer's linears add up
count, mean, second moment (float64 sums of float32 products), extremes and a token sample of each site's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import SITES, linear_module
from .statistics import SiteStatistics

LARGEST = 16  # tokens of largest norm kept in the sample of a site


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
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.sample.add(x, self.count)
        self.count += len(x)
        part = {"mean": x.sum(0, dtype=torch.float64), "second_moment": (x.mT @ x).double(), "mean_absolute": x.abs().sum(0, dtype=torch.float64)}
        for name, value in part.items():
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value
        low, high = x.aminmax(dim=0)
        self.sums["minimum"] = torch.minimum(self.sums.get("minimum", low), low)
        self.sums["maximum"] = torch.maximum(self.sums.get("maximum", high), high)

    def result(self) -> SiteStatistics:
        means = {name: (self.sums[name] / self.count).cpu() for name in ("mean", "second_moment", "mean_absolute")}
        extremes = {name: self.sums[name].double().cpu() for name in ("minimum", "maximum")}
        return SiteStatistics(count=self.count, samples=self.sample.tokens().cpu(), **means, **extremes)


def sample_positions(windows: int, window: int, samples: int, seed: int) -> Tensor:
    """Sorted positions in the joined windows: the first token of up to an eighth as many windows, the rest drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(0, windows * window, window)[: max(1, samples // 8)]
    drawn = torch.randperm(windows * window, generator=generator)
    drawn = drawn[drawn % window != 0][: max(0, samples - len(first))]
    return torch.cat([first, drawn]).sort().values


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first decoder layer are known."""


def layer_inputs(model: nn.Module, windows: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states (windows, window, d) before the first decoder layer, and the keyword arguments of every layer.

    Masks and position embeddings depend on the window length alone; they are recorded in one forward pass of one window,
    so that nothing is assumed about how an architecture builds them.
    """
    layers, hidden, arguments = model.model.layers, [], []

    def record(_module: nn.Module, _positional: tuple, keywords: dict) -> None:
        arguments.append({key: value for key, value in keywords.items() if key not in ("past_key_values", "hidden_states")})

    def stop(_module: nn.Module, positional: tuple, keywords: dict) -> None:
        hidden.append(positional[0] if positional else keywords["hidden_states"])
        raise _Stop

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    model.model(windows[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for window in windows:
        try:
            model.model(window[None], use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return torch.cat(hidden), arguments


@torch.no_grad()
def collect(model: nn.Module, tokens: Tensor, samples: int = 256, seed: int = 0,
            progress: Callable[[Iterable], Iterable] = iter) -> dict[str, SiteStatistics]:
    """Statistics of every site of a transformers decoder.

    ``tokens`` (windows, window) of token ids; returns ``layers.{i}.{site}`` -> :class:`SiteStatistics` over all windows x window
    tokens. ``progress`` wraps the iteration over layers.
    """
    device = next(model.parameters()).device
    hidden, arguments = layer_inputs(model, tokens.to(device))
    positions = sample_positions(*tokens.shape, samples, seed)
    found: dict[str, SiteStatistics] = {}
    for index, layer in progress(list(enumerate(model.model.layers))):
        accumulators = {site: Accumulator(positions) for site in SITES}
        handles = [layer.get_submodule(linear_module(linears[0])).register_forward_pre_hook(
            lambda _module, inputs, seen=accumulators[site]: seen.add(inputs[0])) for site, linears in SITES.items()]
        for window in range(len(hidden)):
            output = layer(hidden[window: window + 1], **arguments[index])
            hidden[window] = (output[0] if isinstance(output, tuple) else output)[0]
        for handle in handles:
            handle.remove()
        found.update({site_name(index, site): accumulator.result() for site, accumulator in accumulators.items()})
    return found
