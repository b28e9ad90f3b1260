"""MR-GPTQ (arXiv 2509.23202): GPTQ in activation order, static scales, MSE-searched for floats.

The third part of the publication, a block Hadamard transform, is a separate transform here. The
publication takes second moments with rounded activations; use ``propagation: sequential`` with
``quantized_activations`` for that. Cached statistics are of exact activations.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SCALES, BLOCK_SIZE, DAMPING
from .gptq import solve


def mr_gptq(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    block_scales: str = BLOCK_SCALES,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by MR-GPTQ; ``block_scales`` is the ``range`` of float
    elements.

    ``mse`` is the search of the publication (100 steps down to 0.2, norm 2.4, unless the scheme
    sets other numbers), ``minmax`` does no search. Schemes with another range search (such as
    ``exhaustive``) and integer schemes are not changed. ``global_scale`` (*batch, 1, 1) is that of a
    scheme which shares it by site.
    """
    used = searched(scheme, block_scales)
    return solve(weight, statistics, used, damping, block_size, True, "static", global_scale=global_scale)


def searched(scheme: QuantScheme, block_scales: str) -> QuantScheme:
    """``scheme`` with range ``block_scales`` for float elements."""
    if scheme.element_format.kind != "float" or scheme.range != "minmax" or block_scales == "minmax":
        return scheme
    return replace(scheme, range=block_scales)
