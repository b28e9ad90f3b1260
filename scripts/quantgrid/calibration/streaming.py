"""Layer-by-layer weight loading for models larger than memory.

Embedding, final norm and lm_head are loaded; the decoder layers are empty. Code that moves the
hidden states of all windows through one layer before the next (calibration, perplexity, residual
error) needs each layer once: iterating over the layers of a streamed model loads them. The
arithmetic is that of the whole model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..models import skeletons
from ..models.plans import END_ROLES, LAYER_PREFIX
from .layers import DecoderFolder, pieces


class Source(Protocol):
    """Source of decoder weights: :class:`FullPrecision` or ``checkpoints.PackedCheckpoint``."""

    def skeleton(self) -> nn.Module:
        """transformers model with embedding, final norm and lm_head, and empty decoder layers."""

    def fill(self, index: int, layer: nn.Module) -> None:
        """Load the weights of the empty decoder layer ``index``."""


class FullPrecision:
    """Unmodified model of a canonical folder, in ``dtype`` on ``device``; of ``layers`` only the first.

    :class:`ConfigError` names a missing tensor.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        layers: int | None = None,
    ):
        self.decoder, self.dtype, self.device = DecoderFolder(folder, layers), dtype, device

    def skeleton(self) -> nn.Module:
        decoder = self.decoder
        return skeletons.skeleton(
            decoder.config, decoder.stored(END_ROLES.values()), decoder.folder, self.dtype, self.device
        )

    def fill(self, index: int, layer: nn.Module) -> None:
        prefix = LAYER_PREFIX.format(layer=index)
        found: set[str] = set()
        for names in pieces(prefix + name for name in layer.state_dict()):
            tensors = self.decoder.stored(names)
            skeletons.fill(layer, prefix, tensors, self.dtype, self.device)
            found |= tensors.keys()
        skeletons.require_filled(layer, prefix, self.decoder.folder, found)


class StreamedLayers(nn.ModuleList):
    """Decoder layers that ``fill`` loads during iteration; each is emptied when the next is
    requested."""

    def __init__(self, layers: Iterable[nn.Module], fill: Callable[[int, nn.Module], None]):
        super().__init__(layers)
        self.fill = fill

    def __iter__(self) -> Iterator[nn.Module]:
        return self._loaded(enumerate(self.children()))

    def __reversed__(self) -> Iterator[nn.Module]:
        return self._loaded(reversed([*enumerate(self.children())]))

    def _loaded(self, layers: Iterable[tuple[int, nn.Module]]) -> Iterator[nn.Module]:
        for index, layer in layers:
            self.fill(index, layer)
            try:
                yield layer
            finally:
                layer.to("meta")


def streamed(source: Source) -> nn.Module:
    """Model of ``source`` for code that iterates over its layers; its forward method cannot run."""
    model = source.skeleton()
    model.model.layers = StreamedLayers(model.model.layers, source.fill)
    return model
