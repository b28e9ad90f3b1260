"""The decoder while its transform is learned: weights folded by the transform's own primitives, inputs rounded, all differentiable.

A layer is transformers' own module; hooks before its linears apply online operations and rounding. Primitives before the first learned one
are folded once, into the *base*. The others act in one of two ways:

folded    the layer is called with folded weights in the place of its parameters: needed where the rounded weights decide the loss;
mapped    the weights stay those of the base, and every site's input goes through T, is rounded and goes through the inverse of T, which is
          the same function as long as no weight is rounded: y = Q(x T) T⁻¹ Wᵀ = Q(x T) (W T⁻ᵀ)ᵀ. The residual stream stays in the basis of the
          base, no gradient of a weight is needed, and the cost depends on the tokens of a batch instead of on the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .. import corpora
from ..architecture import LINEARS, SITES, layer_tensors, linear_module
from ..calibration import layer_inputs
from ..cell_schemes import CellSchemes
from ..checkpoints import load_full_precision
from ..decoders import DecoderFolder, DecoderLayer
from ..linear import SiteInput, compute_device
from ..resources import KEPT, kept_bytes
from ..transforms.composition import InputMap, Parameters, Transform
from ..workplace import Workplace
from .straight_through import StraightThrough, round_weight


class Folding:
    """The layers of a decoder as functions of the learned parameters (float32), starting from the transform ``start``."""

    def __init__(self, folder: str | Path, start: Transform, device: torch.device | str = "cpu"):
        self.decoder, self.primitives, self.device = DecoderFolder(folder), start.primitives, device
        self.shape = self.decoder.shape
        self.first = next((number for number, primitive in enumerate(self.primitives) if hasattr(primitive, "learns")), len(self.primitives))
        self.constants = {name: tensor.to(device, torch.float32) for name, tensor in start.parameters.items()}
        self.bases = [self._base(start, index) for index in range(self.shape.layers)]

    def _base(self, start: Transform, index: int) -> DecoderLayer:
        """The layer after the primitives that nothing learned comes before, folded in float64."""
        layer = self.decoder.layer(index)
        for number in range(self.first):
            start.fold_one(layer, number)
        layer.weights = {role: tensor.to(self.device, torch.float32) for role, tensor in layer.weights.items()}
        return layer

    def transform(self, values: Parameters) -> Transform:
        return Transform(self.primitives, {**self.constants, **values})

    def fold(self, index: int, values: Parameters) -> DecoderLayer:
        """Layer ``index`` under the learned ``values``."""
        base, transform = self.bases[index], self.transform(values)
        layer = DecoderLayer(index, self.shape, dict(base.weights), online={site: list(found) for site, found in base.online.items()})
        for number in range(self.first, len(self.primitives)):
            transform.fold_one(layer, number)
        return layer


class MappedInput(SiteInput):
    """A site's input through ``maps``, rounded, and through their inverses, for linears of unchanged weights."""

    def __init__(self, online: list[dict[str, Any]], rounding: nn.Module | None, consumers: int, maps: list[InputMap]):
        super().__init__(online, rounding, consumers)
        self.maps = maps

    def round(self, x: Tensor) -> Tensor:
        if self.rounding is None or not self.maps:
            return super().round(x)
        with torch.autocast(x.device.type, enabled=False):  # a rotation in bfloat16 is none
            mapped = x.float()
            for forward, _ in self.maps:
                mapped = forward(mapped)
            mapped = self.rounding(mapped)
            for _, inverse in reversed(self.maps):
                mapped = inverse(mapped)
        return mapped.to(x.dtype)


class Network(Folding):
    """A decoder that computes as the quantized one will: inputs rounded as ``schemes`` says, weights too with ``round_weights``.

    ``gradient`` of the rounding: see ``straight_through.py``.
    """

    def __init__(self, folder: str | Path, start: Transform, schemes: CellSchemes, round_weights: bool, windows: Tensor,
                 device: torch.device | str = "cpu", gradient: str = "range"):
        super().__init__(folder, start, device)
        self.schemes, self.round_weights, self.gradient = schemes, round_weights and schemes.weight is not None, gradient
        self.mapped = not self.round_weights and all(hasattr(primitive, "input_map") for primitive in self.primitives[self.first:])
        self.model = load_full_precision(folder, torch.float32, device).requires_grad_(False)
        self.windows = windows.to(device)
        self.layers = self.model.model.layers
        with torch.no_grad():
            _, self.arguments = layer_inputs(self.model, self.windows[:1])
        self._active: dict[str, SiteInput] = {}  # empty while the unmodified model runs
        for layer in self.layers:
            for site, linears in SITES.items():
                for linear in linears:
                    layer.get_submodule(linear_module(linear)).register_forward_pre_hook(lambda _, inputs, site=site: self._prepared(site, inputs))

    @classmethod
    def at(cls, place: Workplace, start: Transform, schemes: CellSchemes, round_weights: bool, gradient: str) -> Network:
        """The network of a workplace's model and windows, on its device."""
        return cls(place.model, start, schemes, round_weights, corpora.load(place.windows)[0], compute_device(place.device), gradient)

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded; where nothing is, every transform computes the same and there is nothing to learn."""
        return self.round_weights or bool(self.schemes.activation)

    def _prepared(self, site: str, inputs: tuple) -> tuple | None:
        return (self._active[site](inputs[0])[0], *inputs[1:]) if self._active else None

    def _rounding(self, layer: DecoderLayer, site: str) -> StraightThrough | None:
        candidates = self.schemes.activation.get(site)
        return StraightThrough(candidates, self.gradient, layer.input_clips.get(site)) if candidates else None

    def _maps(self, layer: DecoderLayer, values: Parameters) -> dict[str, list[InputMap]]:
        """Maps of each site's input by the primitives that are not folded into the base."""
        if not self.mapped:
            return {site: [] for site in SITES}
        transform = self.transform(values)
        parts = [(primitive, transform.part(f"{number}.model.", f"{number}.{layer.index}."))
                 for number, primitive in enumerate(self.primitives) if number >= self.first]
        return {site: [found for primitive, part in parts if (found := primitive.input_map(site, self.shape, part))] for site in SITES}

    @contextmanager
    def _sites(self, layer: DecoderLayer, values: Parameters) -> Iterator[None]:
        """Inputs of the layer's linears are prepared as the quantized model will, on the way in."""
        maps = self._maps(layer, values)
        self._active = {site: MappedInput(layer.online[site], self._rounding(layer, site), len(linears), maps[site])
                        for site, linears in SITES.items()}
        try:
            yield
        finally:
            self._active = {}

    def _weights(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Tensors by their names inside the layer's module; weights clipped and rounded where that is trained."""
        weights = dict(layer.weights)
        for linear in LINEARS if self.round_weights else ():
            clip = layer.clips.get(linear)
            weights[linear] = round_weight(clip(weights[linear]) if clip else weights[linear], self.schemes.weight, self.gradient)
        names = layer_tensors(self.shape.architecture, layer.index)
        prefix = f"model.layers.{layer.index}."
        return {names[role].removeprefix(prefix): tensor for role, tensor in weights.items()}

    def layer(self, index: int, hidden: Tensor, values: Parameters) -> Tensor:
        """``hidden`` (batch, tokens, d) after layer ``index`` of the rounded network, in the basis that :meth:`ends` gives it."""
        layer = self.bases[index] if self.mapped else self.fold(index, values)
        weights = self._weights(layer)
        device = torch.device(self.device).type
        with self._sites(layer, values), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = functional_call(self.layers[index], weights, (hidden,), self.arguments[index])
        return (output[0] if isinstance(output, tuple) else output).to(hidden.dtype)

    @torch.no_grad()
    def full_precision_layer(self, index: int, hidden: Tensor) -> Tensor:
        """``hidden`` (batch, tokens, d) after layer ``index`` of the unmodified model."""
        output = self.layers[index](hidden, **self.arguments[index])
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def embedded(self, windows: Tensor) -> Tensor:
        """Hidden states (batch, tokens, d) before the first layer of the unmodified model."""
        return self.model.model.embed_tokens(windows)

    def ends(self, hidden: Tensor, values: Parameters) -> tuple[Tensor, dict[str, Any]]:
        """``hidden`` in the basis of the network's residual stream, and what leads back out of it: a norm gain and a matrix (d, d), none where
        nothing turned."""
        identity = torch.eye(hidden.shape[-1], device=hidden.device)
        ends = {"embedding": hidden.flatten(0, -2), "final_norm": torch.ones(hidden.shape[-1], device=hidden.device), "lm_head": identity}
        for number, primitive in enumerate(self.primitives[: self.first] if self.mapped else self.primitives):
            primitive.fold_ends(ends, self.transform(values).part(f"{number}.model."))
        back = None if ends["lm_head"] is identity else ends["lm_head"].mT
        return ends["embedding"].view_as(hidden), {"gain": ends["final_norm"], "back": back}

    def logits(self, windows: Tensor, values: Parameters) -> Tensor:
        """(batch, tokens, vocabulary) of the rounded network. Where all layers take more than ``KEPT`` bytes they are computed again on the way
        back instead of being kept."""
        hidden, out = self.ends(self.embedded(windows), values)
        again = not self.mapped or windows.numel() * kept_bytes(self.shape) > KEPT
        for index in range(len(self.layers)):
            hidden = checkpoint(self.layer, index, hidden, values, use_reentrant=False) if again else self.layer(index, hidden, values)
        hidden = functional_call(self.model.model.norm, {"weight": out["gain"]}, (hidden,))
        hidden = hidden if out["back"] is None else hidden @ out["back"]
        return self.model.lm_head(hidden * self.model.model.norm.weight)
