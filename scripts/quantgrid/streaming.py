"""Models that are larger than memory: transformers decoders of which one layer at a time has its weights.

Embedding, final norm and lm_head are there, the decoder layers are empty. Whatever moves the hidden states of all windows through one layer
before the next (calibration, perplexity, the error over depth) needs each layer once: iterating over the layers of a streamed model reads
them. The arithmetic is that of the whole model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from . import skeletons
from .architecture import END_ROLES, LAYER_PREFIX
from .decoders import DecoderFolder


class Source(Protocol):
    """Where the weights of a decoder come from: :class:`FullPrecision`, ``checkpoints.PackedCheckpoint``."""

    def skeleton(self) -> nn.Module:
        """The transformers model with its ends; its decoder layers are empty."""

    def fill(self, index: int, layer: nn.Module) -> None:
        """Give the empty decoder layer ``index`` its weights."""


class FullPrecision:
    """The unmodified model of a canonical folder, in ``dtype`` on ``device``; a tensor that is missing is a :class:`ConfigError` with its name."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        self.decoder, self.dtype, self.device = DecoderFolder(folder), dtype, device

    def skeleton(self) -> nn.Module:
        decoder = self.decoder
        return skeletons.skeleton(decoder.config, decoder.stored(END_ROLES.values()), decoder.folder, self.dtype, self.device)

    def fill(self, index: int, layer: nn.Module) -> None:
        prefix = LAYER_PREFIX.format(layer=index)
        names = [prefix + name for name, _ in layer.named_parameters()]
        skeletons.fill(layer, prefix, self.decoder.stored(names), self.dtype, self.device)
        skeletons.require_filled(layer, prefix, self.decoder.folder)


class StreamedLayers(nn.ModuleList):
    """Decoder layers that ``fill`` gives their weights as they are iterated over; each is emptied when the next one is asked for."""

    def __init__(self, layers: Iterable[nn.Module], fill: Callable[[int, nn.Module], None]):
        super().__init__(layers)
        self.fill = fill

    def __iter__(self) -> Iterator[nn.Module]:
        for index, layer in enumerate(self.children()):
            self.fill(index, layer)
            try:
                yield layer
            finally:
                layer.to("meta")


def streamed(source: Source) -> nn.Module:
    """The model of ``source`` for what iterates over its decoder layers; its own forward pass cannot run."""
    model = source.skeleton()
    model.model.layers = StreamedLayers(model.model.layers, source.fill)
    return model
