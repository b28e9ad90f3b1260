"""Round to nearest: each weight to the closest value of its scheme, without calibration data."""

from __future__ import annotations

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...quantizer.tensors import quantize
from ...schemes.quant_scheme import QuantScheme


def rtn(weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme) -> Compensated:
    """Round ``weight`` (*batch, m, n) to nearest in ``scheme``; ``statistics`` is unused."""
    return Compensated(quantize(weight, scheme))
