"""Differentiable decoder for learning a transform: folded weights, rounded inputs.

Layers are transformers modules; hooks before their linears apply online operations and rounding.
Primitives before the first learned one are folded once, into the *base*. The others act in one of
two ways:

folded    the layer is called with folded weights as its parameters: needed where the loss
          depends on the rounded weights;
mapped    the weights stay those of the base, and every site's input is multiplied by T, rounded
          and multiplied by the inverse of T, the same function as long as no weight is rounded:
          y = Q(x T) T⁻¹ Wᵀ = Q(x T) (W T⁻ᵀ)ᵀ. The residual stream stays in the basis of the
          base, no weight gradient is needed, and the cost depends on the tokens of a batch
          instead of the size of the model (``mapped.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..calibration.collect import layer_inputs
from ..calibration.layers import DecoderFolder, DecoderLayer
from ..corpora import token_windows
from ..inference.input_maps import EMPTY, InputMap
from ..inference.linear import SiteInput, compute_device
from ..inference.online import cast
from ..inference.transform import Parameters, Transform
from ..machine.devices import Placement
from ..machine.memory import KEPT, kept_bytes
from ..models.plans import kind_of
from ..quantization.checkpoints import load_full_precision
from ..schemes.cell_schemes import CellSchemes
from .mapped import MappedInput
from .straight_through import StraightThrough, round_weight
from .training_context import TrainingContext


class Folding:
    """Decoder layers as functions of the learned parameters (float32), initially ``start``."""

    def __init__(self, folder: str | Path, start: Transform, device: torch.device | str = "cpu"):
        self.decoder = DecoderFolder(folder, placement=Placement(torch.device(device)))
        self.primitives, self.device = start.primitives, device
        self.shape = self.decoder.shape
        self.first = next(
            (number for number, primitive in enumerate(self.primitives) if hasattr(primitive, "learns")),
            len(self.primitives),
        )
        self.constants = {name: tensor.to(device, torch.float32) for name, tensor in start.parameters.items()}
        self.bases = [self._base(start, index) for index in range(self.shape.layers)]

    def _base(self, start: Transform, index: int) -> DecoderLayer:
        """Layer after the primitives that precede all learned ones, folded in float64."""
        layer = self.decoder.layer(index)
        for number in range(self.first):
            start.fold_one(layer, number)
        layer.weights = {role: tensor.to(self.device, torch.float32) for role, tensor in layer.weights.items()}
        layer.online = {
            site: [dict(cast(operation, torch.float32, self.device)) for operation in operations]
            for site, operations in layer.online.items()
        }
        return layer

    def transform(self, values: Parameters) -> Transform:
        return Transform(self.primitives, {**self.constants, **values})

    def fold(self, index: int, values: Parameters) -> DecoderLayer:
        """Layer ``index`` under the learned ``values``."""
        base, transform = self.bases[index], self.transform(values)
        layer = DecoderLayer(
            index, self.shape, dict(base.weights), online={site: list(found) for site, found in base.online.items()}
        )
        for number in range(self.first, len(self.primitives)):
            transform.fold_one(layer, number)
        return layer


class Network(Folding):
    """Decoder that computes as the quantized model, with inputs rounded under ``schemes``.

    ``round_weights`` rounds weights too. ``gradient`` of the rounding: see ``straight_through.py``.
    """

    def __init__(
        self,
        folder: str | Path,
        start: Transform,
        schemes: CellSchemes,
        round_weights: bool,
        windows: Tensor,
        device: torch.device | str = "cpu",
        gradient: str = "range",
    ):
        super().__init__(folder, start, device)
        self.schemes, self.round_weights, self.gradient = (
            schemes,
            round_weights and schemes.weight is not None,
            gradient,
        )
        self.mapped = not self.round_weights and all(
            hasattr(primitive, "input_map") for primitive in self.primitives[self.first :]
        )
        self.model = load_full_precision(folder, torch.float32, device).requires_grad_(False)
        self.windows = windows.to(device)
        self.layers = self.model.model.layers
        with torch.no_grad():
            _, self.arguments = layer_inputs(self.model, self.windows[:1])
        self._active: dict[str, SiteInput] = {}  # empty while the unmodified model runs
        for index, layer in enumerate(self.layers):
            plan = self.shape.plan(index)
            for linear in plan.linears:
                layer.get_submodule(plan.modules[linear]).register_forward_pre_hook(
                    lambda _, inputs, site=plan.site_of[linear]: self._prepared(site, inputs)
                )

    @classmethod
    def at(
        cls, context: TrainingContext, start: Transform, schemes: CellSchemes, round_weights: bool, gradient: str
    ) -> Network:
        """Network for the model, windows and device of a training context."""
        return cls(
            context.model_folder,
            start,
            schemes,
            round_weights,
            token_windows.load(context.windows_file)[0],
            compute_device(context.device),
            gradient,
        )

    @property
    def rounds(self) -> bool:
        """Check whether anything is rounded.

        If nothing is, all transforms compute the same function and there is nothing to learn.
        """
        return self.round_weights or bool(self.schemes.activation)

    def _prepared(self, site: str, inputs: tuple) -> tuple | None:
        return (self._active[site](inputs[0])[0], *inputs[1:]) if self._active else None

    def _rounding(self, layer: DecoderLayer, site: str) -> StraightThrough | None:
        candidates = self.schemes.activation.get(kind_of(site))
        return StraightThrough(candidates, self.gradient, layer.input_clips.get(site)) if candidates else None

    def _maps(self, layer: DecoderLayer, values: Parameters) -> dict[str, InputMap]:
        """The map of each site's input by the primitives that are not folded into the base."""
        maps = {site: EMPTY[kind_of(site)] for site in layer.plan.sites}
        transform = self.transform(values)
        for number in range(self.first, len(self.primitives) if self.mapped else self.first):
            primitive, part = self.primitives[number], transform.part(f"{number}.model.", f"{number}.{layer.index}.")
            maps = {site: primitive.input_map(site, self.shape, part, before) for site, before in maps.items()}
        return maps

    @contextmanager
    def _sites(self, layer: DecoderLayer, values: Parameters) -> Iterator[None]:
        """Prepare the inputs of the layer's linears as the quantized model does, within the
        context."""
        maps = self._maps(layer, values)
        self._active = {
            name: MappedInput(layer.online[name], self._rounding(layer, name), site.together, maps[name])
            for name, site in layer.plan.sites.items()
        }
        try:
            yield
        finally:
            self._active = {}

    def _weights(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Tensors by name inside the layer's module; weights clipped and rounded if configured."""
        weights = dict(layer.weights)
        for linear in layer.plan.linears if self.round_weights else ():
            clip = layer.clips.get(linear)
            weights[linear] = round_weight(
                clip(weights[linear]) if clip else weights[linear], self.schemes.weight, self.gradient
            )
        return {layer.plan.tensors[role]: tensor for role, tensor in weights.items()}

    def layer(self, index: int, hidden: Tensor, values: Parameters) -> Tensor:
        """Output (batch, tokens, d) of rounded layer ``index`` for ``hidden``, in the basis of
        :meth:`ends`."""
        layer = self.bases[index] if self.mapped else self.fold(index, values)
        weights = self._weights(layer)
        device = torch.device(self.device).type
        with self._sites(layer, values), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = functional_call(self.layers[index], weights, (hidden,), self.arguments[index])
        return (output[0] if isinstance(output, tuple) else output).to(hidden.dtype)

    @torch.no_grad()
    def full_precision_layer(self, index: int, hidden: Tensor) -> Tensor:
        """Output (batch, tokens, d) of layer ``index`` of the unmodified model for ``hidden``."""
        output = self.layers[index](hidden, **self.arguments[index])
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def embedded(self, windows: Tensor) -> Tensor:
        """Hidden states (batch, tokens, d) before the first layer of the unmodified model."""
        return layer_inputs(self.model, windows)[0]

    def ends(self, hidden: Tensor, values: Parameters) -> tuple[Tensor, dict[str, Any]]:
        """``hidden`` in the basis of the network's residual stream, and the map back out of it.

        The map has the tensors of the final norm and a matrix (d, d), None without a rotation.
        """
        identity = torch.eye(hidden.shape[-1], device=hidden.device)
        ends = {
            "embedding": hidden.flatten(0, -2),
            "final_norm": torch.ones(hidden.shape[-1], device=hidden.device),
            "lm_head": identity,
        }
        own = dict(self.model.model.norm.named_parameters())
        ends |= {"final_norm_center": own["center"]} if "center" in own else {}
        for number, primitive in enumerate(self.primitives[: self.first] if self.mapped else self.primitives):
            primitive.fold_ends(ends, self.transform(values).part(f"{number}.model."))
        back = None if ends["lm_head"] is identity else ends["lm_head"].mT
        norm = {"weight": ends["final_norm"], "center": ends.get("final_norm_center")}
        norm |= {"bias": torch.zeros_like(own["bias"])} if "bias" in own else {}
        return ends["embedding"].view_as(hidden), {"norm": {name: norm[name] for name in own}, "back": back}

    def target(self, wanted: Tensor, norm: dict[str, Tensor]) -> Tensor:
        """Layer output ``wanted`` (batch, tokens, d) of the unmodified model as the network's stream can hold it:
        without its mean over the channels where the final ``norm`` of :meth:`ends` no longer subtracts that."""
        own = dict(self.model.model.norm.named_parameters())
        if "center" not in own:
            return wanted
        return wanted - (own["center"] - norm["center"]) * wanted.mean(-1, keepdim=True)

    def last_hidden(self, windows: Tensor, values: Parameters) -> Tensor:
        """Input (batch, tokens, d) of the lm_head of the rounded network.

        If the activations of all layers exceed ``KEPT`` bytes the backward pass recomputes them.
        """
        hidden, out = self.ends(self.embedded(windows), values)
        again = not self.mapped or windows.numel() * kept_bytes(self.shape) > KEPT
        for index in range(len(self.layers)):
            hidden = (
                checkpoint(self.layer, index, hidden, values, use_reentrant=False)
                if again
                else self.layer(index, hidden, values)
            )
        own = self.model.model.norm
        hidden = functional_call(own, out["norm"], (hidden,))
        hidden = (hidden if out["back"] is None else hidden @ out["back"]) * own.weight
        bias = getattr(own, "bias", None)
        return hidden if bias is None else hidden + bias
