"""The roundings that other mitigations build on, by the name that an option ``base`` gives."""

from __future__ import annotations

from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .compensated import Compensated
from .gptaq import gptaq
from .gptq import gptq
from .mr_gptq import mr_gptq
from .rtn import rtn


def solve_base(base: str, weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, damping: float = 0.01, block_size: int = 128,
               activation_order: bool = False, scales: str = "static") -> Compensated:
    """``weight`` (*batch, m, n) by ``rtn``, ``gptq``, ``mr_gptq`` or ``gptaq``.

    Damping and block size are of the last three; order and scales of ``gptq`` and ``gptaq``, MR-GPTQ being defined by its own.
    """
    if base == "rtn":
        return rtn(weight, statistics, scheme)
    if base == "mr_gptq":
        return mr_gptq(weight, statistics, scheme, damping, block_size)
    return {"gptq": gptq, "gptaq": gptaq}[base](weight, statistics, scheme, damping, block_size, activation_order, scales)
