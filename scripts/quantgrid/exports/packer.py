"""Tensors and config of an exported folder, layer by layer: the part that every target of weights shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .capabilities import bias_keys
from .features import Features
from .packed_cell import ExportLayer, PackedCell


class Packer:
    """Packer of one export.

    ``dtype`` is that of the exported model. Subclasses pack the linears of a layer and describe the
    format in config.json; ``flags`` are those of the target.
    """

    has_adapter = False  # low-rank terms go into an adapter folder

    def __init__(self, features: Features, dtype: torch.dtype, flags: frozenset[str] = frozenset()):
        self.features, self.dtype, self.flags = features, dtype, flags
        self.biased = bias_keys(features.shape.family, features.biased)

    def prepare(self, cell: PackedCell) -> None:
        """Read what the format needs to know of the whole cell before the first layer."""

    def linears(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Tensors of the linears of a layer."""
        raise NotImplementedError(f"{type(self).__name__} does not define linears")

    def config(self) -> dict[str, Any]:
        """Entries of config.json beside those of the architecture, known after the last layer."""
        return {}

    def files(self) -> dict[str, str]:
        """Further text files of the folder by name, known after the last layer."""
        return {}

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings, norms and biases in the model's dtype; those that it would change keep theirs."""
        return {name: self.lossless(tensor) for name, tensor in tensors.items()}

    def lossless(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the model's dtype, or float32 values as they are if that would change them."""
        found = tensor.to(self.dtype)
        return found if tensor.dtype != torch.float32 or torch.equal(found.float(), tensor) else tensor

    def layer(self, layer: ExportLayer) -> dict[str, Tensor]:
        """All tensors of a layer by name."""
        return {**self.plain(layer.plain), **self.linears(layer), **self._biases(layer)}

    def _biases(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Biases of the linears; zeros where a key of the config gives a linear one that the cell lacks."""
        found, keys = {}, self.features.shape.family.biases
        for name, parts in layer.parts.items():
            bias = layer.bias(name)
            if bias is None and any(keys.get(role) in self.biased for role in layer.roles[name]):
                bias = torch.zeros(sum(part.shape[0] for part in parts))
            if bias is not None:
                found[f"{name}.bias"] = self.lossless(bias)
        return found

    def architecture(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json of the export, without the description of the format."""
        return {**config, **self.biased, "dtype": str(self.dtype).removeprefix("torch.")}
