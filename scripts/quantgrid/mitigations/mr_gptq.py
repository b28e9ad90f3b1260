"""MR-GPTQ (arXiv 2509.23202): GPTQ in activation order with static scales, those of float elements searched for least error.

The publication's third part, a block Hadamard transform, is a transform of its own here. Its second moments are taken with rounded
activations, which is ``propagation: sequential`` with ``quantized_activations``; from cached statistics they are of exact activations.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .compensated import Compensated
from .gptq import solve


def mr_gptq(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, damping: float = 0.01, block_size: int = 128,
            block_scales: str = "mse") -> Compensated:
    """MR-GPTQ of ``weight`` (*batch, m, n); ``block_scales`` is the ``range`` of float elements: ``mse``, the publication's search
    (100 steps down to 0.2, norm 2.4, unless the scheme has its own numbers), or ``minmax``.

    A scheme that searches its ranges by itself (``exhaustive``, say), and one of integers, keeps what it has.
    """
    return solve(weight, statistics, searched(scheme, block_scales), damping, block_size, activation_order=True)


def searched(scheme: QuantScheme, block_scales: str) -> QuantScheme:
    """``scheme`` with the block scales of float elements found by ``block_scales``."""
    if scheme.element_format.kind != "float" or scheme.range != "minmax" or block_scales == "minmax":
        return scheme
    return replace(scheme, range=block_scales)
