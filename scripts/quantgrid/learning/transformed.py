"""Trainable transformed model: transformers layers with folded weights and differentiable rounding.

Weights are folded in float64 as for every other mitigation, kept in float32, and can be replaced by
name when a layer runs. The whole model is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..calibration.collect import layer_inputs
from ..calibration.layers import DecoderFolder, DecoderLayer
from ..corpora import token_windows
from ..ground.errors import ConfigError
from ..inference.key_values import round_key_values
from ..inference.linear import placement
from ..inference.transform import folded_ends
from ..models.lm_head import head_of
from ..models.plans import END_ROLES, LINEARS
from ..models.skeletons import empty_model
from ..quantization.cached import Quantized, Recipe, add_layer, quantize_linears, transformed
from ..quantization.checkpoints import CheckpointContent
from ..quantization.layer_errors import Site
from ..quantization.sequential import RunningLayer, Sequential
from ..quantizer.quantized_weight import Compensated
from .straight_through import StraightRounding
from .training_context import TrainingContext


@dataclass
class Trained:
    """Quantized model, losses per step as CSV, and per part of the training both losses and the
    choice."""

    quantized: Quantized
    losses: str
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)


class TransformedModel:
    """Model of ``context`` under ``recipe``, with rounded weights of all linears.

    ``windows`` (count, tokens) of token ids; ``gradient`` of the rounding: see
    ``straight_through.py``.
    """

    def __init__(self, recipe: Recipe, context: TrainingContext, gradient: str):
        if recipe.schemes.weight is None:
            raise ConfigError(
                "the format leaves weights in full precision, so there is nothing to train; use one such as 'int4'"
            )
        if {*recipe.schemes.linears} != {*LINEARS}:
            raise ConfigError(
                "a mitigation that trains needs a format that rounds every linear; use one without 'linears'"
            )
        place = placement({"device": context.device, "solver_dtype": context.solver_dtype})
        self.recipe, self.gradient, self.device = recipe, gradient, place.device
        self.decoder = DecoderFolder(context.model_folder, placement=place)
        self.windows = token_windows.load(context.windows_file)[0].to(self.device)
        self.result = Quantized(CheckpointContent(self.decoder.config, recipe.schemes))
        ends = folded_ends(recipe.transform, self.decoder, torch.bfloat16)
        self.result.content.add_ends(ends)
        self.network = empty_model(self.result.content.config, self.result.content.tensors).eval()
        if recipe.schemes.key_value:
            round_key_values(self.network, recipe.schemes.key_value)
        self.layers = self.network.model.layers
        self.roundings = [
            self._insert(layer) for layer in transformed(self.decoder, recipe, range(self.decoder.shape.layers))
        ]
        stored = {name: self.result.content.tensors[name].float() for role in ends for name in [END_ROLES[role]]}
        self.network.load_state_dict(stored, strict=False, assign=True)
        self.network.tie_weights()
        self.network.to(self.device).requires_grad_(False)
        with torch.no_grad():
            _, self.arguments = layer_inputs(self.network, self.windows[:1])

    def _insert(self, layer: DecoderLayer) -> dict[str, Any]:
        """Load the tensors of ``layer`` into the network; return the rounding of its site
        inputs."""
        roundings = add_layer(self.result, layer, self.recipe.schemes.activation)
        module = self.layers[layer.index]
        RunningLayer(
            module,
            layer,
            {site: StraightRounding(rounding, self.gradient) for site, rounding in roundings.items()},
            Sequential(self.windows, quantized_activations=True, device=self.device),
        )
        if self.recipe.schemes.key_value and layer.plan.caches:
            attention = module.get_submodule(layer.plan.attention)
            attention.key_values.rounding = StraightRounding(attention.key_values.rounding, self.gradient)
        return roundings

    def weights(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Weights to round of a folded layer, linear -> (1, m, n) float32, with learned clipping
        applied."""
        found = {linear: layer.weights[linear].float() for linear in layer.plan.linears}
        return {
            linear: (layer.clips[linear](weight) if linear in layer.clips else weight)[None]
            for linear, weight in found.items()
        }

    def folded(self, index: int) -> DecoderLayer:
        """Layer ``index`` with its statistics, folded again."""
        return next(transformed(self.decoder, self.recipe, range(index, index + 1)))

    def stream_back(self) -> Tensor | None:
        """Map (d, d) of the residual stream to that of the unmodified model; None without a rotation of it."""
        identity = torch.eye(self.decoder.shape.hidden_size, dtype=torch.float64)
        ends = {"embedding": identity, "final_norm": torch.ones_like(identity[0]), "lm_head": identity}
        self.recipe.transform.fold_ends(ends)
        return None if ends["lm_head"] is identity else ends["lm_head"].mT.to(self.device, torch.float32)

    def embedded(self) -> Tensor:
        """Hidden states (windows, tokens, d) before the first layer."""
        with torch.no_grad():
            return layer_inputs(self.network, self.windows)[0]

    def layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output of layer ``index`` for ``hidden`` (batch, tokens, d) with ``weights``, linear ->
        (m, n).

        Everything else is rounded as in the stored model; without ``weights`` nothing is rounded.
        """
        module = self.layers[index]
        for part in module.modules():
            if isinstance(part, StraightRounding):
                part.active = weights is not None
        names = self.decoder.shape.plan(index).tensors
        replaced = {names[linear]: weight for linear, weight in (weights or {}).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = functional_call(module, replaced, (hidden,), self.arguments[index])
        return (output[0] if isinstance(output, tuple) else output).to(hidden.dtype)

    @torch.no_grad()
    def advance(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Apply :meth:`layer` to all windows, one by one."""
        return torch.cat([self.layer(index, window[None], weights) for window in hidden])

    def logits(self, windows: Tensor, weights: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """Logits (batch, tokens, vocabulary) with ``weights`` of every layer.

        The backward pass recomputes the layers instead of keeping their activations.
        """
        with torch.no_grad():
            hidden, _ = layer_inputs(self.network, windows)
        for index in range(len(self.layers)):
            hidden = checkpoint(self.layer, index, hidden, weights[index], use_reentrant=False)
        return head_of(self.network)(self.network.model.norm(hidden))

    def store(self, layer: DecoderLayer, solved: Mapping[str, Compensated]) -> None:
        """Add the ``solved`` linears of a folded ``layer`` to the result, and record their
        errors."""
        recipes = {linear: replace(self.recipe, mitigation=lambda *_, of=of: of) for linear, of in solved.items()}
        for site, reading in layer.plan.sites.items():
            measured = Site.of([(layer, self.roundings[layer.index], site)])
            for linear in reading.linears:
                quantize_linears(self.result, recipes[linear], [(layer, linear)], measured)

    def finished(self) -> Quantized:
        """Return the result, once every layer is stored."""
        self.result.finish(self.decoder, self.recipe.statistics_file)
        return self.result
