"""Round to nearest: each weight to the closest value of its scheme, without calibration data."""

from __future__ import annotations

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...quantizer.tensors import find_parameters, quantize
from ...schemes.quant_scheme import QuantScheme


def rtn(
    weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, global_scale: Tensor | None = None
) -> Compensated:
    """Round ``weight`` (*batch, m, n) to nearest in ``scheme``; ``statistics`` is unused.

    ``global_scale`` (*batch, 1, 1) is that of a scheme which shares it by site.
    """
    return Compensated(quantize(weight, scheme, find_parameters(weight, scheme, global_scale)))
