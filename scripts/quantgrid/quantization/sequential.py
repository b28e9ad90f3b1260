"""Sequential propagation: quantize every linear on the outputs of its quantized predecessors.

The order is that of the official codes of GPTQ, QuaRot and GPTAQ: layer by layer, and within a
layer {q, k, v}, {o}, {gate, up}, {down}. The statistics of a site are collected after all its
predecessors were quantized. The running model is the transformed one, with folded weights and
online operations. In memory are one decoder layer, the hidden states of all windows and the second
moment of one site (for paired statistics also the unquantized layer and its hidden states). Each
layer runs five times. Reported errors use the statistics of the full-precision model, as in every
other cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.accumulators import Accumulator, site_name
from ..calibration.collect import advance, layer_inputs
from ..calibration.experts import Routed, shrunk, unseen
from ..calibration.layers import DecoderFolder, DecoderLayer
from ..calibration.statistics import PairedStatistics, SiteStatistics, stack
from ..corpora.token_windows import load
from ..inference.key_values import round_key_values
from ..inference.linear import QuantizedLinear, Rounding, SiteInput
from ..inference.online import cast
from ..inference.transform import folded_ends
from ..models.plans import END_ROLES, LINEARS, kind_of
from ..models.skeletons import skeleton
from ..quantizer.quantized_weight import Compensated
from .cached import Quantized, Recipe, add_layer, keep_linears, quantize_linears, transformed
from .checkpoints import CheckpointContent
from .layer_errors import Site
from .sequential_state import SequentialState


@dataclass(frozen=True)
class Sequential:
    """Settings of the calibration run on ``windows`` (count, tokens) of token ids.

    Activations, keys and values are rounded or not; ``paired`` runs the unquantized model as well.
    The first ``skip_first`` tokens of every window are context only and enter no statistics.
    """

    windows: Tensor
    quantized_activations: bool = False
    paired: bool = False
    skip_first: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @classmethod
    def load(cls, path: str | Path, **fields: Any) -> Sequential:
        """Load the windows that ``tokenize_corpus`` wrote to ``path``."""
        return cls(load(path)[0], **fields)


class _Reached(Exception):
    """Stop a forward pass at the observed site."""


class _Watched(nn.Module):
    """Round a site's input if configured and pass it to ``look``, which may stop the forward
    pass."""

    def __init__(self, rounding: Rounding | None):
        super().__init__()
        self.rounding, self.look = rounding, None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rounding is None else self.rounding(x)
        if self.look is not None:
            self.look(x)
        return x


class RunningLayer:
    """One transformed decoder layer as a module; its linears are replaced as they are quantized."""

    def __init__(
        self,
        module: nn.Module,
        layer: DecoderLayer,
        roundings: Mapping[str, Rounding],
        how: Sequential,
        rounded: Sequence[str] = LINEARS,
    ):
        self.module, self.how, self.rounded = module, how, rounded
        self.plan = plan = layer.plan
        self.tensors = {plan.tensors[role]: tensor.to(how.device, how.dtype) for role, tensor in layer.weights.items()}
        self.watched = {site: _Watched(deepcopy(roundings.get(site))).to(how.device) for site in plan.sites}
        self.inputs = {
            name: SiteInput(
                [cast(operation, how.dtype, how.device) for operation in layer.online[name]],
                self.watched[name],
                site.together,
            )
            for name, site in plan.sites.items()
        }
        for linear in plan.linears:
            self._set(plan.site_of[linear], linear, self.tensors.pop(f"{plan.modules[linear]}.weight"))
        replaced = {plan.modules[linear] for linear in plan.linears}
        rest = {name: tensor for name, tensor in self.tensors.items() if name.rpartition(".")[0] not in replaced}
        module.load_state_dict(rest, strict=False, assign=True)

    def _set(self, site: str, linear: str, weight: Tensor, *term: Any) -> None:
        bias = self.tensors.get(f"{self.plan.modules[linear]}.bias")
        self.module.set_submodule(
            self.plan.modules[linear],
            QuantizedLinear(weight, bias, self.inputs[site], *term, rounded=kind_of(linear) in self.rounded),
        )

    def quantized(self, site: str, linear: str, solved: Compensated) -> None:
        """Replace ``linear`` by ``solved``, whose batch is this layer alone."""
        low_rank = solved.low_rank and tuple(
            factor[0].to(self.how.device, self.how.dtype) for factor in solved.low_rank
        )
        self._set(site, linear, solved.weight()[0].to(self.how.device, self.how.dtype), low_rank, solved.branch_input)

    def input_of(self, site: str, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Input (tokens, n) of the linears of ``site`` for layer input ``hidden`` (1, tokens,
        d)."""
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

    @property
    def experts(self) -> nn.ModuleList:
        """Routed experts of the layer."""
        return self.module.get_submodule(self.plan.sites["mlp_input"].block).experts

    def routed(self, hidden: Tensor, arguments: Mapping[str, Any], skip_first: int) -> Routed:
        """Tokens and choices of the router over all windows ``hidden`` (windows, tokens, d)."""
        found = Routed(self.experts, skip_first, hidden.shape[1])
        for window in hidden.split(1):
            self.module(window, **arguments)
        found.handle.remove()
        return found

    def routed_statistics(self, site: str, routed: Routed) -> SiteStatistics:
        """Statistics of the input of all experts, or of one expert's down projection, then shrunk.

        The sample holds the largest tokens only.
        """
        accumulator = Accumulator(torch.empty(0, dtype=torch.int64))
        if site not in self.plan.expert_sites:
            for tokens in routed.hidden:
                accumulator.add(self.inputs[site].prepare(tokens))
            return accumulator.result(self.how.device)
        number = int(site.partition(".")[2])
        for tokens in routed.tokens_of(number):
            if len(tokens):
                accumulator.add(self.inputs[site].prepare(self.experts[number].inner(tokens)))
        if accumulator.count:
            return shrunk(accumulator.result(self.how.device))
        return unseen(self.experts[number].down_proj.weight.shape[-1], 1)

    def advance(self, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        """Replace the layer inputs ``hidden`` (windows, tokens, d) by the layer outputs, in
        place."""
        advance(self.module, hidden, arguments)


@torch.no_grad()
def quantize_sequentially(
    decoder: DecoderFolder,
    recipe: Recipe,
    how: Sequential,
    progress: Callable[[Iterable], Iterable] = iter,
    state: SequentialState | None = None,
) -> Quantized:
    """Quantize as :func:`.cached.quantize_decoder`, with statistics from the windows of ``how``.

    With a ``state``, packed tensors are kept in its files, and an interrupted quantization goes on
    behind the last layer that was saved.
    """
    result = Quantized(CheckpointContent(decoder.config, recipe.schemes, tensors=state.packed if state else {}))
    modules, hidden, arguments = _begin(decoder, recipe, how)
    original_hidden = hidden.clone() if how.paired else None
    kept = [hidden, original_hidden] if how.paired else [hidden]
    done = state.resume(result, kept) if state else 0
    if not done:
        result.content.add_ends(folded_ends(recipe.transform, decoder, torch.bfloat16))
    modules[:done] = [None] * done
    for index in progress(range(done, decoder.shape.layers)):
        (layer,) = transformed(decoder, recipe, range(index, index + 1))
        roundings = add_layer(result, layer, recipe.schemes.activation)
        original = RunningLayer(_unrounded(deepcopy(modules[index]), layer), layer, {}, how) if how.paired else None
        running = RunningLayer(
            modules[index], layer, roundings if how.quantized_activations else {}, how, recipe.schemes.linears
        )
        routed: Routed | None = None
        for site, reading in layer.plan.sites.items():
            rounded = [linear for linear in reading.linears if recipe.schemes.weight_of(index, linear)]
            for linear in reading.linears:
                if linear not in rounded:
                    keep_linears(result, [(layer, linear)])
            if not rounded:
                continue
            if reading.block or site in layer.plan.expert_sites:
                routed = routed or running.routed(hidden, arguments[index], how.skip_first)
                statistics = running.routed_statistics(site, routed)
            else:
                statistics = _statistics(
                    running, original, site, hidden, original_hidden, arguments[index], how.skip_first
                )
            statistics.require_finite(f"{site_name(index, site)} behind quantized layers")
            measured = Site.of([(layer, roundings, site)])
            statistics = replace(
                stack([statistics]).to(decoder.placement.device),
                solver_dtype=decoder.placement.solver_dtype,
                scaling=measured.statistics.scaling,
            )
            for linear in rounded:
                solved = quantize_linears(result, recipe, [(layer, linear)], measured, statistics)
                running.quantized(site, linear, solved)
                del layer.weights[linear]  # a layer of many experts would not fit twice
        running.advance(hidden, arguments[index])
        if original is not None:
            original.advance(original_hidden, arguments[index])
        modules[index] = None
        if state:
            state.save(index + 1, result, kept)
    result.finish(decoder, recipe.statistics_file)
    return result


def _begin(decoder: DecoderFolder, recipe: Recipe, how: Sequential) -> tuple[list, Tensor, list[dict[str, Any]]]:
    """(empty decoder layers, inputs (windows, tokens, d) of the first, keyword arguments per
    layer)."""
    ends = {
        END_ROLES[role]: tensor
        for role, tensor in folded_ends(recipe.transform, decoder, how.dtype).items()
        if role != "lm_head"
    }
    model = skeleton(
        {**decoder.config, "tie_word_embeddings": True}, ends, decoder.folder, how.dtype, how.device
    )  # logits are not needed
    if how.quantized_activations and recipe.schemes.key_value:
        round_key_values(model, recipe.schemes.key_value)
    return list(model.model.layers), *layer_inputs(model, how.windows.to(how.device))


def _unrounded(module: nn.Module, layer: DecoderLayer) -> nn.Module:
    """``module`` of ``layer`` with keys and values left unrounded."""
    attention = module.get_submodule(layer.plan.attention)
    if hasattr(attention, "key_values"):
        attention.key_values.rounding, attention.key_values.rotate_keys = None, False
    return module


def _statistics(
    running: RunningLayer,
    original: RunningLayer | None,
    site: str,
    hidden: Tensor,
    original_hidden: Tensor | None,
    arguments: Mapping[str, Any],
    skip_first: int,
) -> SiteStatistics:
    """Statistics of the inputs of ``site`` over all windows except their ``skip_first`` tokens.

    The token sample holds the largest tokens only.
    """
    accumulator, cross = Accumulator(torch.empty(0, dtype=torch.int64)), None
    for window in range(len(hidden)):
        x = running.input_of(site, hidden[window : window + 1], arguments)[skip_first:]
        accumulator.add(x)
        if original is not None:
            wanted = original.input_of(site, original_hidden[window : window + 1], arguments)[skip_first:]
            part = ((wanted.float() - x.float()).mT @ x.float()).double()
            cross = part if cross is None else cross.add_(part)
    found = accumulator.result(running.how.device)
    if cross is None:
        return found
    return PairedStatistics(
        **{
            name: getattr(found, name)
            for name in ("count", "mean", "second_moment", "mean_absolute", "minimum", "maximum", "samples")
        },
        cross=cross / found.count,
    )
