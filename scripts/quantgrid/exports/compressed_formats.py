"""Formats of compressed-tensors: the one that holds a pair of schemes. Standard library only."""

from __future__ import annotations

from ..schemes.quant_scheme import QuantScheme
from .capabilities import DTYPE_OF_SCALE

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, MXFP6, MXFP8 = "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"
NVFP4 = "nvfp4-pack-quantized"
# element -> (format, rule by which loaders round scales of activations)
MX = {"e2m1": (MXFP4, "even"), "e2m3": (MXFP6, "even"), "e4m3": (MXFP8, "rceil")}
BLOCK_FORMATS = (MXFP4, MXFP6, MXFP8, NVFP4)


def weight_format(weight: QuantScheme, activation: QuantScheme | None) -> str | None:
    """Name of the format that holds weights in ``weight`` with inputs in ``activation``; None if
    there is none."""
    element, blocks = weight.element_format, (weight.scale_format, weight.group_size, weight.global_scale)
    if weight.scale_rule == "four_thirds":
        return None
    if element.kind == "integer":
        unpacked = activation is not None and (element.bits == 8 or not weight.symmetric)
        return INTEGER if unpacked else PACKED
    if weight.element in MX and blocks == ("e8m0", 32, "none"):
        return MX[weight.element][0]
    if weight.element == "e2m1" and blocks[:2] == ("e4m3", 16) and weight.global_scale in ("tensor", "site"):
        return NVFP4
    if weight.element == "e4m3" and weight.granularity != "group" and weight.scale_format in DTYPE_OF_SCALE:
        return FLOAT if weight.global_scale == "none" else None
    return None
