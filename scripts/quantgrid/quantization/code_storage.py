"""Stored form of the codes and parameters of a quantized tensor.

Tensors below its name: ``codes``, ``scale`` and, if the scheme has them, ``zero_point``,
``global_scale``, ``codebook``. Codes, and scales and zero points of fewer than 8 bits, are packed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..quantizer.packing import pack, packed_length, unpack
from ..quantizer.tensors import QuantizedTensor
from ..schemes.quant_scheme import QuantScheme

PARAMETERS = ("scale", "zero_point", "global_scale", "codebook")


def code_tensors(quantized: QuantizedTensor, layer: int) -> dict[str, Tensor]:
    """Stored tensors of one layer of ``quantized``, whose batch dimension is the layers."""
    scheme, packed = quantized.scheme, packed_bits(quantized.scheme)
    found = {"codes": pack(quantized.codes[layer], scheme.element_format.bits)}
    for part in PARAMETERS:
        if (tensor := getattr(quantized, part)) is not None:
            found[part] = pack(tensor[layer].flatten(), packed[part]) if part in packed else tensor[layer]
    return found


def packed_bits(scheme: QuantScheme) -> dict[str, int]:
    """Bits of the parameters stored as packed codes: scales and zero points of fewer than 8
    bits."""
    bits = {"scale": scheme.storage.bits, "zero_point": scheme.zero_point_bits}
    return {part: width for part, width in bits.items() if 0 < width < 8}


def stored_bits(shape: tuple[int, int], scheme: QuantScheme) -> int:
    """Bits of the stored form of a tensor (m, n), with the padding of packed rows to whole bytes."""
    scales = math.prod(scheme.scale_shape(shape))
    packed = [(*shape, scheme.element_format.bits), *((1, scales, bits) for bits in packed_bits(scheme).values())]
    padding = sum(rows * (8 * packed_length(length, bits) - length * bits) for rows, length, bits in packed)
    return round(math.prod(shape) * scheme.bits_per_element(shape)) + padding


def take_codes(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Quantized tensor of ``shape`` below ``name``, removed from ``tensors``."""
    parts = {part: tensors.pop(f"{name}.{part}", None) for part in ("codes", *PARAMETERS)}
    parts["codes"] = unpack(parts["codes"], scheme.element_format.bits, shape, signed=scheme.code_range[0] < 0)  # type: ignore[arg-type]
    for part, bits in packed_bits(scheme).items():
        scale_shape = scheme.scale_shape(shape)
        parts[part] = unpack(parts[part], bits, (math.prod(scale_shape),), signed=False).reshape(scale_shape)  # type: ignore[arg-type]
    return QuantizedTensor(scheme=scheme, dtype=torch.float32, **parts)  # type: ignore[arg-type]
