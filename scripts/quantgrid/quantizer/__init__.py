"""Quantizer: ranges, scales, codes and bit packing of tensors under a scheme."""

from .packing import pack, unpack
from .scales import QuantizationParameters
from .tensors import QuantizedTensor, fake_quantize, find_parameters, quantize

dequantize = QuantizedTensor.dequantize

__all__ = [
    "QuantizationParameters",
    "QuantizedTensor",
    "dequantize",
    "fake_quantize",
    "find_parameters",
    "pack",
    "quantize",
    "unpack",
]
