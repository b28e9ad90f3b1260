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

from ..models.plans import END_ROLES, LAYER_PREFIX, kind_of
from ..models.shapes import shape_from_config
from ..models.skeletons import fill, require_filled, skeleton
from .gguf_names import PARTS, gguf_name, halved, rotated_heads


class GGUFSource:
    """Source of decoder weights (``calibration.streaming.Source``): the file ``path``, dequantized,
    for a transformers ``config``. The file stays mapped; one layer at a time is in memory."""

    def __init__(self, path: str | Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32):
        self.path, self.config, self.dtype = Path(path), config, dtype
        self.shape = shape_from_config(config, str(path))
        self.tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def skeleton(self) -> nn.Module:
        """transformers model with embedding, final norm and lm_head, and empty decoder layers."""
        return skeleton(self.config, self._read(END_ROLES.values()), self.path, self.dtype, "cpu")

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
        fill(layer, prefix, found, self.dtype, "cpu")
        require_filled(layer, prefix, self.path, found)

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
