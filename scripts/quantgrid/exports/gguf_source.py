"""Weights of a GGUF file as a transformers model, read by the ``gguf`` package and not by the code
that packed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from ..models.plans import LAYER_PREFIX, kind_of
from ..models.shapes import shape_from_config
from ..models.skeletons import fill, require_filled, skeleton
from .gguf_names import PARTS, gguf_name, halved, rotated_heads

_UNROUNDED = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16)
_BLOCK = 32


def rounded_to_bytes(x: Tensor) -> Tensor:
    """``x`` (*, n) as llama.cpp rounds inputs of quantized linears (Q8_0, Q8_1): blocks of 32, codes
    -127 to 127 by the largest magnitude, the step stored in float16."""
    blocks = x.unflatten(-1, (-1, _BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, torch.round(blocks / step), 0.0)
    return (codes * step.half().float()).flatten(-2)


class GGUFSource:
    """Source of decoder weights (``calibration.streaming.Source``): the file ``path``, dequantized to
    float32, for a transformers ``config``. The file stays mapped; one layer at a time is in memory.

    ``rounded_inputs``: linears with quantized weights read :func:`rounded_to_bytes` of their input.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], rounded_inputs: bool = False):
        self.path, self.config, self.rounded_inputs = Path(path), config, rounded_inputs
        self.shape = shape_from_config(config, str(path))
        self.tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def skeleton(self) -> nn.Module:
        """transformers model with embedding, final norm and lm_head, and empty decoder layers."""
        return skeleton(self.config, self._read(self.shape.family.ends), self.path, torch.float32, "cpu")

    def fill(self, index: int, layer: nn.Module) -> None:
        """Load the weights of the empty decoder layer ``index``; linears get the biases that the file
        has."""
        prefix, plan = LAYER_PREFIX.format(layer=index), self.shape.plan(index)
        found = self._read(
            (prefix + module + part for module in plan.modules.values() for part in PARTS),
            {prefix + plan.modules[role]: rotated_heads(self.shape, kind_of(role)) for role in plan.linears},
        )
        for module in plan.modules.values():
            if (bias := found.get(f"{prefix}{module}.bias")) is not None:
                layer.get_submodule(module).bias = nn.Parameter(bias.to("meta"))
        if self.rounded_inputs:
            self._round_inputs(prefix, layer, [plan.modules[role] for role in plan.linears])
        fill(layer, prefix, found, torch.float32, "cpu")
        require_filled(layer, prefix, self.path, found)

    def _round_inputs(self, prefix: str, layer: nn.Module, modules: Iterable[str]) -> None:
        """Round the inputs of the linears whose weights are quantized in the file."""
        for module in modules:
            held = self.tensors[gguf_name(self.shape, f"{prefix}{module}.weight")]
            if held.tensor_type not in _UNROUNDED:
                layer.get_submodule(module).register_forward_pre_hook(
                    lambda _module, inputs: (rounded_to_bytes(inputs[0]),)
                )

    def _read(self, names: Iterable[str], heads: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Those of the tensors ``names`` (of transformers) that the file holds, float32; ``heads`` maps
        linears to the heads whose rows are restored to halves."""
        found = {}
        for name in names:
            held = self.tensors.get(gguf_name(self.shape, name))
            if held is None:
                continue
            values = gguf.dequantize(held.data, held.tensor_type)
            factor = self.tensors.get(f"{held.name.removesuffix('.weight')}.scale")
            if factor is not None:
                values = values * np.asarray(factor.data, np.float32)
            count = (heads or {}).get(name.rpartition(".")[0], 0)
            found[name] = torch.from_numpy(np.array(halved(values, count) if count else values, np.float32))
        return found
