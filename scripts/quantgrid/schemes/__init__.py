"""Quantization schemes: number formats, presets and rounding options. Standard library only."""

from .named import activation_scheme, scheme
from .presets import PRESETS
from .quant_scheme import QuantScheme

__all__ = ["PRESETS", "QuantScheme", "activation_scheme", "scheme"]
