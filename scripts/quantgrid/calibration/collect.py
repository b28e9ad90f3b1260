"""Calibration: statistics of every site of an unmodified model, collected layer by layer.

The hidden states of all windows pass through one decoder layer at a time. Hooks on its linears
accumulate count, mean, second moment (float32 sums over one window, added in float64), extremes and
a token sample of each site's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import ConfigError
from ..machine.devices import in_smaller_parts
from ..models.canonical import shape_of
from ..models.shapes import ModelShape
from .accumulators import Accumulator, sample_positions, site_name
from .defaults import SAMPLES
from .experts import Routed, expert_rows
from .statistics import LARGEST, SiteStatistics, to_tensors


class _Passage(nn.Module):
    """Stand-in for a decoder layer: records its input and returns it unchanged."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.named = list(signature(layer.forward).parameters)[1:]

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        given = {**dict(zip(self.named, positional)), **arguments}
        self.hidden = hidden_states
        self.arguments = {key: value for key, value in given.items() if key not in ("past_key_values", "layer_past")}
        return hidden_states


@contextmanager
def _passages(model: nn.Module) -> Iterator[list[_Passage]]:
    """Temporarily replace the decoder layers of ``model`` by stand-ins; layer weights may be
    missing."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(map(_Passage, layers.children()))
    try:
        yield list(model.model.layers)
    finally:
        model.model.layers = layers


def layer_inputs(model: nn.Module, windows: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states (windows, window, d) before the first layer, and keyword arguments per layer.

    Masks and position embeddings depend on the window length only. They are recorded in a forward
    pass of the first window, so nothing is assumed about how an architecture builds them. No
    decoder layer runs.
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
    """Replace layer inputs (windows, window, d) by layer outputs, ``batch_size`` windows at a
    time, or fewer where a GPU has too little memory."""

    def run(rows: range) -> None:
        part = hidden[rows.start : rows.stop]
        output = layer(part, **arguments)
        part.copy_(output[0] if isinstance(output, tuple) else output)

    windows = range(len(hidden))
    in_smaller_parts([windows[start : start + batch_size] for start in windows[::batch_size]], run)


@torch.no_grad()
def collect_layers(
    model: nn.Module,
    tokens: Tensor,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    skip_first: int = 0,
    everyone: bool = False,
) -> Iterator[dict[str, SiteStatistics]]:
    """Yield the results of :func:`collect` layer by layer, and of experts one by one, as soon as they are
    known."""
    count, window = tokens.shape
    if skip_first >= window:
        raise ConfigError(
            f"skip_first {skip_first} leaves no tokens of windows of {window} tokens; accepted: 0 to {window - 1}"
        )
    device = next(model.parameters()).device
    hidden, arguments = layer_inputs(model, tokens.to(device))
    positions, shape = sample_positions(count, window - skip_first, samples, seed), shape_of(model)
    for index, layer in zip(progress(range(len(arguments))), model.model.layers):
        plan = shape.plan(index)
        accumulators = {site: Accumulator(positions) for site in plan.sites if site not in plan.expert_sites}
        routed = (
            Routed(layer.get_submodule(plan.sites["mlp_input"].block).experts, skip_first, window)
            if plan.expert_sites
            else None
        )
        handles = [
            layer.get_submodule(
                plan.sites[site].block or plan.modules[plan.sites[site].linears[0]]
            ).register_forward_pre_hook(
                lambda _module, inputs, seen=seen: seen.add(_kept(inputs[0], window, skip_first))
            )
            for site, seen in accumulators.items()
        ]
        advance(layer, hidden, arguments[index])
        for handle in handles:
            handle.remove()
        yield {site_name(index, site): accumulators.pop(site).result() for site in list(accumulators)}
        if routed is not None:
            yield from routed.statistics(index, samples, seed, everyone)


def _kept(x: Tensor, window: int, skip_first: int) -> Tensor:
    """Rows (tokens, n) of windows without their first tokens, for inputs with or without a batch dimension."""
    return x.reshape(-1, window, x.shape[-1])[:, skip_first:]


def collect(
    model: nn.Module,
    tokens: Tensor,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    skip_first: int = 0,
    everyone: bool = False,
) -> dict[str, SiteStatistics]:
    """Statistics of every site of a transformers decoder.

    ``tokens`` (windows, window) of token ids. Returns ``layers.{i}.{site}`` ->
    :class:`SiteStatistics` over all windows x (window - ``skip_first``) tokens: the first tokens of
    every window are context only. ``progress`` wraps the iteration over layers. ``everyone``: statistics
    of an expert are over all tokens, not over those that the router sends it; outputs stay routed.
    """
    layers = collect_layers(model, tokens, samples, seed, progress, skip_first, everyone)
    return {name: statistics for layer in layers for name, statistics in layer.items()}


def kept_tensors(shape: ModelShape, tokens: Tensor, samples: int, seed: int, skip_first: int) -> dict[str, Tensor]:
    """Tensors of the statistics file of :func:`collect`, by name, as meta tensors of that dtype and
    shape."""
    count, window = len(tokens), tokens.shape[1] - skip_first
    rows = len(sample_positions(count, window, samples, seed)) + min(LARGEST, count * window)
    found: dict[str, Tensor] = {}
    for layer in range(shape.layers):
        plan = shape.plan(layer)
        for site in plan.sites:
            size = shape.site_size(site)
            vector = torch.empty(size, device="meta")
            kept = expert_rows(samples) if site in plan.expert_sites else rows
            moment, sample = (vector.expand(length, size) for length in (size, kept))
            found |= to_tensors(
                site_name(layer, site), SiteStatistics(count * window, vector, moment, vector, vector, vector, sample)
            )
    return found
