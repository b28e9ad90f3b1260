"""AWQ's file format (gemm): 4-bit codes along the output dimension in AWQ's order, float16
scales, zero points per group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantizer.scales import effective_step
from ..quantizer.tensors import QuantizedTensor
from .gptq import zero_points
from .packed_cell import ExportLayer, by_rows
from .packer import Packer
from .words import awq_words, unsigned_codes


class Awq(Packer):
    """Packer of AWQ folders."""

    def linears(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Words, zero points and scales of the linears of a layer."""
        return {
            f"{linear.name}.{part}": tensor
            for linear in layer.joined
            for part, tensor in awq_tensors(by_rows(linear.quantized)).items()  # type: ignore[arg-type]
        }

    def config(self) -> dict[str, Any]:
        """``quantization_config``."""
        weight = self.features.schemes.weight
        assert weight is not None
        return {
            "quantization_config": {
                "quant_method": "awq",
                "bits": weight.element_format.bits,
                "group_size": weight.group_size or -1,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": ["lm_head"],
            }
        }


def awq_tensors(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Tensors of a linear (m, n): ``qweight`` (n, m / 8), ``qzeros`` (groups, m / 8), ``scales``
    (groups, m)."""
    scale = effective_step(quantized.parameters, quantized.scheme)
    return {
        "qweight": awq_words(unsigned_codes(quantized).T.contiguous()),
        "qzeros": awq_words(zero_points(quantized).T.contiguous()),
        "scales": scale.T.to(torch.float16).contiguous(),
    }
