"""The transformed model while it is trained: transformers' own layers on folded weights, online operations, rounding that gradients pass.

Weights are folded in float64 exactly as for every other mitigation, kept in float32, and can be replaced by name when a layer runs. All of the
model is held at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .. import corpora
from ..architecture import END_ROLES, LINEARS, SITES, linear_module
from ..calibration import layer_inputs
from ..checkpoints import CheckpointContent
from ..decoders import DecoderFolder, DecoderLayer
from ..errors import ConfigError
from ..key_values import round_key_values
from ..layer_errors import Site
from ..linear import compute_device
from ..mitigations.compensated import Compensated
from ..propagation import RunningLayer, Sequential
from ..quantization import Quantized, Recipe, add_layer, quantize_linear, transformed
from ..skeletons import empty_model
from ..transform_costs import transform_costs
from ..transforms.composition import folded_ends
from ..workplace import Workplace
from .straight_through import StraightRounding


@dataclass
class Trained:
    """The quantized model, the losses of the steps as CSV, and per part of the training its start and end loss and which was kept."""

    quantized: Quantized
    losses: str
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)


class TransformedModel:
    """The model of ``place`` under ``recipe``, which rounds the weights of all linears; ``windows`` (count, tokens) of token ids, ``gradient`` of
    the rounding (``straight_through.py``)."""

    def __init__(self, recipe: Recipe, place: Workplace, gradient: str):
        if recipe.schemes.weight is None:
            raise ConfigError("a format that leaves weights in full precision leaves nothing to train; use one that rounds them, such as 'int4'")
        if {*recipe.schemes.linears} != {*LINEARS}:
            raise ConfigError("a mitigation that trains rounds every linear; use a format without 'linears'")
        self.recipe, self.decoder, self.device = recipe, DecoderFolder(place.model), compute_device(place.device)
        self.gradient = gradient
        self.windows = corpora.load(place.windows)[0].to(self.device)
        self.result = Quantized(CheckpointContent(self.decoder.config, recipe.schemes))
        ends = folded_ends(recipe.transform, self.decoder, torch.bfloat16)
        self.result.content.add_ends(ends)
        self.network = empty_model(self.result.content.config).eval()
        if recipe.schemes.key_value:
            round_key_values(self.network, recipe.schemes.key_value)
        self.layers = self.network.model.layers
        self.roundings = [self._insert(layer) for layer in transformed(self.decoder, recipe, range(self.decoder.shape.layers))]
        stored = {name: self.result.content.tensors[name].float() for role in ends for name in [END_ROLES[role]]}
        self.network.load_state_dict(stored, strict=False, assign=True)
        self.network.tie_weights()
        self.network.to(self.device).requires_grad_(False)
        with torch.no_grad():
            _, self.arguments = layer_inputs(self.network, self.windows[:1])

    def _insert(self, layer: DecoderLayer) -> dict[str, Any]:
        """Put the tensors of ``layer`` into the network; how the inputs of its sites are rounded."""
        roundings = add_layer(self.result, layer, self.recipe.schemes.activation)
        module = self.layers[layer.index]
        RunningLayer(module, layer, {site: StraightRounding(rounding, self.gradient) for site, rounding in roundings.items()},
                     Sequential(self.windows, quantized_activations=True, device=self.device))
        if self.recipe.schemes.key_value:
            attention = module.get_submodule(linear_module("k").rpartition(".")[0])
            attention.key_values.rounding = StraightRounding(attention.key_values.rounding, self.gradient)
        return roundings

    def weights(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """What is to be rounded of a folded layer, linear -> (1, m, n) float32: clipped where the transform learned to."""
        found = {linear: layer.weights[linear].float() for linear in LINEARS}
        return {linear: (layer.clips[linear](weight) if linear in layer.clips else weight)[None] for linear, weight in found.items()}

    def folded(self, index: int) -> DecoderLayer:
        """Layer ``index`` with its statistics, folded once more."""
        return next(transformed(self.decoder, self.recipe, range(index, index + 1)))

    def embedded(self) -> Tensor:
        """Hidden states (windows, tokens, d) before the first layer."""
        with torch.no_grad():
            return self.network.model.embed_tokens(self.windows)

    def layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """``hidden`` (batch, tokens, d) after layer ``index`` with ``weights``, linear -> (m, n), and everything else rounded as the stored
        model does; without ``weights`` nothing is rounded."""
        module = self.layers[index]
        for part in module.modules():
            if isinstance(part, StraightRounding):
                part.active = weights is not None
        replaced = {f"{linear_module(linear)}.weight": weight for linear, weight in (weights or {}).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = functional_call(module, replaced, (hidden,), self.arguments[index])
        return (output[0] if isinstance(output, tuple) else output).to(hidden.dtype)

    @torch.no_grad()
    def advance(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """:meth:`layer` on all windows, one by one."""
        return torch.cat([self.layer(index, window[None], weights) for window in hidden])

    def logits(self, windows: Tensor, weights: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """(batch, tokens, vocabulary) with ``weights`` of every layer; layers are computed again on the way back instead of being kept."""
        hidden = self.network.model.embed_tokens(windows)
        for index in range(len(self.layers)):
            hidden = checkpoint(self.layer, index, hidden, weights[index], use_reentrant=False)
        return self.network.lm_head(self.network.model.norm(hidden))

    def store(self, layer: DecoderLayer, solved: Mapping[str, Compensated]) -> None:
        """Put the linears of a folded ``layer`` as they are ``solved`` into the result, their errors beside."""
        recipes = {linear: replace(self.recipe, mitigation=lambda *_, of=of: of) for linear, of in solved.items()}
        for site, linears in SITES.items():
            measured = Site.of([layer], [self.roundings[layer.index]], site)
            for linear in linears:
                quantize_linear(self.result, recipes[linear], [layer], linear, measured)

    def finished(self) -> Quantized:
        """The result, once every layer is stored."""
        self.result.costs = transform_costs(self.result.content, self.decoder)
        return self.result
