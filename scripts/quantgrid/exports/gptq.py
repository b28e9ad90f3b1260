"""GPTQ's file format: integers along the input dimension, float16 scales, zero points per group.

The version ``gptq`` stores zero points minus one and cannot hold 0, ``gptq_v2`` stores them as they
are. The first is what most loaders read; the second is written where a zero point is 0.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..quantizer.scales import effective_step
from ..quantizer.tensors import QuantizedTensor
from .packed_cell import ExportLayer, PackedCell, by_rows
from .packer import Packer
from .words import unsigned_codes, words, words_down

V1, V2 = "gptq", "gptq_v2"


class Gptq(Packer):
    """Packer of GPTQ folders."""

    version = V1

    def prepare(self, cell: PackedCell) -> None:
        """Choose the version of the format: a pass over the zero points of asymmetric cells."""
        weight = self.features.schemes.weight
        if weight is not None and not weight.symmetric:
            held = (linear.quantized for layer in cell.layers() for linear in layer.linears)
            if any(part is not None and bool((part.zero_point == 0).any()) for part in held):
                self.version = V2

    def linears(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Words, zero points and scales of the linears of a layer."""
        return {
            f"{linear.name}.{part}": tensor
            for linear in layer.joined
            for part, tensor in gptq_tensors(by_rows(linear.quantized), self.version).items()  # type: ignore[arg-type]
        }

    def config(self) -> dict[str, Any]:
        """``quantization_config``."""
        weight = self.features.schemes.weight
        assert weight is not None
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": weight.element_format.bits,
                "group_size": weight.group_size or -1,
                "desc_act": False,
                "sym": weight.symmetric,
                "lm_head": False,
                "checkpoint_format": self.version,
                "pack_dtype": "int32",
            }
        }

    def files(self) -> dict[str, str]:
        """The same description under the name that older loaders read."""
        return {"quantize_config.json": json.dumps(self.config()["quantization_config"], indent=2) + "\n"}


def zero_points(quantized: QuantizedTensor) -> Tensor:
    """Zero points (m, groups) of unsigned codes, uint8."""
    if quantized.zero_point is not None:
        return quantized.zero_point
    return torch.full_like(quantized.scale, 2 ** (quantized.scheme.element_format.bits - 1), dtype=torch.uint8)


def gptq_tensors(quantized: QuantizedTensor, version: str) -> dict[str, Tensor]:
    """Tensors of a linear (m, n): ``qweight`` (n bits / 32, m), ``qzeros`` (groups, m bits / 32),
    ``scales`` (groups, m), ``g_idx`` (n,).

    Raises :class:`ValueError` for a zero point of 0 in the version ``gptq``.
    """
    bits, n = quantized.scheme.element_format.bits, quantized.codes.shape[1]
    zeros = zero_points(quantized)
    if version == V1 and bool((zeros == 0).any()):
        raise ValueError("checkpoint_format gptq cannot hold a zero point of 0")
    stored = zeros - 1 if version == V1 else zeros
    scale = effective_step(quantized.parameters, quantized.scheme)
    return {
        "qweight": words_down(unsigned_codes(quantized).T.contiguous(), bits),
        "qzeros": words(stored.T.contiguous(), bits),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(n) // (n // scale.shape[1])).to(torch.int32),
    }
