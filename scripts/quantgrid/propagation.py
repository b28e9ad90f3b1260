"""Sequential propagation: every linear is quantized for the inputs that its already quantized predecessors hand on.

As the official codes of GPTQ, QuaRot and GPTAQ do it: layer by layer, and within a layer in the order {q, k, v}, {o}, {gate, up},
{down}, the statistics of a site are taken after everything before it was quantized. The model that runs is the transformed one, folded
weights and online operations, one decoder layer of it at a time: beside the hidden states of all windows there are one layer and the
second moment of one site (for paired statistics the unquantized layer and its hidden states too). Each layer runs five times.
Errors in the result are measured on the statistics of the full-precision model, as those of every other cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import END_ROLES, LAYER_PREFIX, LINEARS, SITES, layer_tensors, linear_module
from .calibration import Accumulator, advance, layer_inputs, site_name
from .checkpoints import CheckpointContent
from .corpora import load
from .decoders import DecoderFolder, DecoderLayer
from .key_values import KeyValues, round_key_values
from .linear import QuantizedLinear, Rounding, SiteInput
from .mitigations.compensated import Compensated
from .online import cast
from .quantization import Quantized, Recipe, Site, add_layer, keep_linear, quantize_linear, transformed
from .skeletons import skeleton
from .statistics import PairedStatistics, SiteStatistics, stack
from .transform_costs import transform_costs
from .transforms.composition import folded_ends


@dataclass(frozen=True)
class Sequential:
    """How the model runs: on ``windows`` (count, tokens) of token ids, with activations, keys and values rounded or not; ``paired``
    lets the unquantized model run beside it. The ``skip_first`` tokens of every window are context alone: no statistics count them."""

    windows: Tensor
    quantized_activations: bool = False
    paired: bool = False
    skip_first: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @classmethod
    def load(cls, path: str | Path, **fields: Any) -> Sequential:
        """On the windows that ``tokenize_corpus`` left at ``path``."""
        return cls(load(path)[0], **fields)


class _Reached(Exception):
    """Ends a forward pass at the site that is looked at."""


class _Watched(nn.Module):
    """Rounds a site's input if asked to, and shows it to ``look``, which may end the pass."""

    def __init__(self, rounding: Rounding | None):
        super().__init__()
        self.rounding, self.look = rounding, None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rounding is None else self.rounding(x)
        if self.look is not None:
            self.look(x)
        return x


class RunningLayer:
    """One transformed decoder layer as a module whose linears are replaced as they are quantized."""

    def __init__(self, module: nn.Module, layer: DecoderLayer, roundings: Mapping[str, Rounding], how: Sequential, rounded: Sequence[str] = LINEARS):
        self.module, self.how, self.rounded = module, how, rounded
        prefix = LAYER_PREFIX.format(layer=layer.index)
        names = layer_tensors(layer.shape.architecture, layer.index)
        self.tensors = {names[role].removeprefix(prefix): tensor.to(how.device, how.dtype) for role, tensor in layer.weights.items()}
        self.watched = {site: _Watched(deepcopy(roundings.get(site))).to(how.device) for site in SITES}
        self.inputs = {site: SiteInput([cast(operation, how.dtype, how.device) for operation in layer.online[site]], self.watched[site], len(linears))
                       for site, linears in SITES.items()}
        for site, linears in SITES.items():
            for linear in linears:
                self._set(site, linear, self.tensors.pop(f"{linear_module(linear)}.weight"))
        rest = {name: tensor for name, tensor in self.tensors.items() if name.rpartition(".")[0] not in map(linear_module, LINEARS)}
        module.load_state_dict(rest, strict=False, assign=True)

    def _set(self, site: str, linear: str, weight: Tensor, *term: Any) -> None:
        bias = self.tensors.get(f"{linear_module(linear)}.bias")
        self.module.set_submodule(linear_module(linear), QuantizedLinear(weight, bias, self.inputs[site], *term, rounded=linear in self.rounded))

    def quantized(self, site: str, linear: str, solved: Compensated) -> None:
        """Let ``linear`` compute as ``solved``, whose batch is this layer alone, does."""
        low_rank = solved.low_rank and tuple(factor[0].to(self.how.device, self.how.dtype) for factor in solved.low_rank)
        self._set(site, linear, solved.weight()[0].to(self.how.device, self.how.dtype), low_rank, solved.branch_input)

    def input_of(self, site: str, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """What reaches the linears of ``site`` (tokens, n) when ``hidden`` (1, tokens, d) enters the layer."""
        seen: list[Tensor] = []

        def look(x: Tensor) -> None:
            seen.append(x.flatten(0, -2))
            raise _Reached

        self.watched[site].look = look
        try:
            self.module(hidden, **arguments)
        except _Reached:
            return seen[0]
        finally:
            self.watched[site].look = None
        raise RuntimeError(f"the decoder layer never reached its site '{site}'")

    def advance(self, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        """Replace the hidden states (windows, tokens, d) that enter the layer by those that leave it."""
        advance(self.module, hidden, arguments)


@torch.no_grad()
def quantize_sequentially(decoder: DecoderFolder, recipe: Recipe, how: Sequential, progress: Callable[[Iterable], Iterable] = iter,
                          packed: MutableMapping[str, Tensor] | None = None) -> Quantized:
    """What :func:`quantization.quantize_decoder` does, with the statistics that mitigations see taken from ``how``'s windows on the way."""
    result = Quantized(CheckpointContent(decoder.config, recipe.schemes, tensors={} if packed is None else packed))
    modules, hidden, arguments = _begin(decoder, recipe, how)
    original_hidden = hidden.clone() if how.paired else None
    result.content.add_ends(folded_ends(recipe.transform, decoder, torch.bfloat16))
    for index in progress(range(decoder.shape.layers)):
        (layer,) = transformed(decoder, recipe, range(index, index + 1))
        roundings = add_layer(result, layer, recipe.schemes.activation)
        original = RunningLayer(_unrounded(deepcopy(modules[index])), layer, {}, how) if how.paired else None
        running = RunningLayer(modules[index], layer, roundings if how.quantized_activations else {}, how, recipe.schemes.linears)
        for site, linears in SITES.items():
            chosen = [linear for linear in linears if linear in recipe.schemes.linears]
            for linear in linears:
                if linear not in chosen:
                    keep_linear(result, [layer], linear)
            if not chosen:
                continue
            statistics = _statistics(running, original, site, hidden, original_hidden, arguments[index], how.skip_first)
            statistics.require_finite(f"{site_name(index, site)} behind quantized layers")
            statistics, measured = stack([statistics]), Site.of([layer], [roundings], site)
            for linear in chosen:
                running.quantized(site, linear, quantize_linear(result, recipe, [layer], linear, measured, statistics))
        running.advance(hidden, arguments[index])
        if original is not None:
            original.advance(original_hidden, arguments[index])
        modules[index] = None
    result.costs = transform_costs(result.content, decoder)
    return result


def _begin(decoder: DecoderFolder, recipe: Recipe, how: Sequential) -> tuple[list, Tensor, list[dict[str, Any]]]:
    """(empty decoder layers, hidden states (windows, tokens, d) before the first, the arguments of every layer)."""
    ends = {END_ROLES[role]: tensor for role, tensor in folded_ends(recipe.transform, decoder, how.dtype).items() if role != "lm_head"}
    model = skeleton({**decoder.config, "tie_word_embeddings": True}, ends, decoder.folder, how.dtype, how.device)  # nobody asks for logits
    if how.quantized_activations and recipe.schemes.key_value:
        round_key_values(model, recipe.schemes.key_value)
    return list(model.model.layers), *layer_inputs(model, how.windows.to(how.device))


def _unrounded(module: nn.Module) -> nn.Module:
    """``module`` with its keys and values, where they would be rounded, left as they are."""
    attention = module.get_submodule(linear_module("k").rpartition(".")[0])
    if hasattr(attention, "key_values"):
        attention.key_values = KeyValues(None, rotate_keys=False)
    return module


def _statistics(running: RunningLayer, original: RunningLayer | None, site: str, hidden: Tensor, original_hidden: Tensor | None,
                arguments: Mapping[str, Any], skip_first: int) -> SiteStatistics:
    """Statistics of the inputs of ``site`` over all windows but their ``skip_first`` tokens; without a token sample but for the largest tokens."""
    accumulator, cross = Accumulator(torch.empty(0, dtype=torch.int64)), None
    for window in range(len(hidden)):
        x = running.input_of(site, hidden[window: window + 1], arguments)[skip_first:]
        accumulator.add(x)
        if original is not None:
            wanted = original.input_of(site, original_hidden[window: window + 1], arguments)[skip_first:]
            part = ((wanted.float() - x.float()).mT @ x.float()).double()
            cross = part if cross is None else cross.add_(part)
    found = accumulator.result()
    if cross is None:
        return found
    return PairedStatistics(**{name: getattr(found, name) for name in ("count", "mean", "second_moment", "mean_absolute", "minimum", "maximum",
                                                                      "samples")}, cross=cross.cpu() / found.count)
