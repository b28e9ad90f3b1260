"""Base quantizers of other mitigations, by the name in the option ``base``."""

from __future__ import annotations

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SIZE, DAMPING, SCALES
from .gptaq import gptaq
from .gptq import gptq
from .mr_gptq import mr_gptq
from .rtn import rtn


def solve_base(
    base: str,
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    activation_order: bool = False,
    scales: str = SCALES,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by ``rtn``, ``gptq``, ``mr_gptq`` or ``gptaq``.

    Damping and block size apply to the last three, activation order and scales to ``gptq`` and
    ``gptaq``: MR-GPTQ fixes both. ``global_scale`` (*batch, 1, 1) is that of a scheme which shares
    it by site.
    """
    if base == "rtn":
        return rtn(weight, statistics, scheme, global_scale)
    if base == "mr_gptq":
        return mr_gptq(weight, statistics, scheme, damping, block_size, global_scale=global_scale)
    return {"gptq": gptq, "gptaq": gptaq}[base](
        weight, statistics, scheme, damping, block_size, activation_order, scales, global_scale=global_scale
    )
