"""Round to nearest: every weight to the closest value of its scheme, whatever the activations."""

from __future__ import annotations

from torch import Tensor

from ..quantizer import QuantScheme, quantize
from ..statistics import SiteStatistics
from .compensated import Compensated


def rtn(weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme) -> Compensated:
    """``weight`` (*batch, m, n) rounded in ``scheme``; the statistics are not used."""
    return Compensated(quantize(weight, scheme))
