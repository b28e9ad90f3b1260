"""Round to nearest after learned changes of the singular values that lower the output error.

Learnable Singular-value Increment (arXiv 2406.16299) learns increments of the singular values,
Singular-value Diagonal Expansion (arXiv 2407.15508) those of a band around their diagonal. Here W'
= U (Σ + B) Vᵀ, B banded, and Q = round(W'). The publications train whole blocks together with
clipping and smoothing. This method trains every linear separately on its second moment: the loss is
tr((Q - W) E[xxᵀ] (Q - W)ᵀ), gradients pass straight through the rounding, and the best step is
kept. It adds no bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...ground.errors import NumericalFailure
from ...quantizer.quantized_weight import Compensated
from ...quantizer.tensors import fake_quantize, quantize
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BANDWIDTH, SINGULAR_LEARNING_RATE, SINGULAR_STEPS


def singular_domain(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    steps: int = SINGULAR_STEPS,
    learning_rate: float = SINGULAR_LEARNING_RATE,
    bandwidth: int = BANDWIDTH,
) -> Compensated:
    """Round ``weight`` (*batch, m, n) after ``steps`` steps on a band of B; step 0 is round to
    nearest.

    The band has ``bandwidth`` diagonals on either side of the main one. ``learning_rate`` is in
    units of the geometric mean of the two singular values of an entry (its row and its column).
    """
    matrices = weight.float().reshape(-1, *weight.shape[-2:])
    moments = statistics.second_moment.float().reshape(-1, *statistics.second_moment.shape[-2:])
    found = [_learned(*layer, scheme, steps, learning_rate, bandwidth) for layer in zip(matrices, moments)]
    changed = torch.stack([best for best, _, _ in found]).reshape(weight.shape)
    details = {"step": [step for _, step, _ in found], "error_to_rounding": [ratio for _, _, ratio in found]}
    return Compensated(quantize(changed, scheme), details=details)


def _learned(
    weight: Tensor, moment: Tensor, scheme: QuantScheme, steps: int, learning_rate: float, bandwidth: int
) -> tuple[Tensor, int, float]:
    """(changed weight (m, n) of least loss, its step, its loss relative to round to nearest), one
    layer."""
    left, values, right = _decomposed(weight)
    offsets = [offset for offset in range(-bandwidth, bandwidth + 1) if abs(offset) < len(values)]
    units = [
        (values[max(0, -d) : len(values) - max(0, d)] * values[max(0, d) : len(values) - max(0, -d)]).sqrt()
        for d in offsets
    ]
    band = [torch.zeros_like(unit) for unit in units]
    optimizer = torch.optim.Adam(band, learning_rate)
    best, least, first, at = weight, float("inf"), 0.0, 0
    for step in range(steps + 1):
        changed = weight + _increment(left, right, [b * unit for b, unit in zip(band, units)], offsets)
        error = fake_quantize(changed, scheme) - weight
        pulled = error @ moment
        loss = (pulled.double() * error).sum().item()
        first = loss if step == 0 else first
        if loss < least:
            best, least, at = changed, loss, step
        if step == steps or first <= 0:
            break
        gradient = left.mT @ pulled @ right.mT
        for diagonal, unit, d in zip(band, units, offsets):
            diagonal.grad = gradient.diagonal(d) * unit / first
        optimizer.step()
    return best, at, least / first if first > 0 else 1.0


def _decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise NumericalFailure(
            f"singular domain: the singular value decomposition of the weight failed ({error})"
        ) from None


def _increment(left: Tensor, right: Tensor, band: list[Tensor], offsets: list[int]) -> Tensor:
    """U B Vᵀ (m, n) for banded B with diagonals ``band`` at ``offsets``; U (m, r), Vᵀ (r, n)."""
    mixed = torch.zeros_like(left)
    for diagonal, d in zip(band, offsets):
        rows, columns = slice(max(0, -d), left.shape[1] - max(0, d)), slice(max(0, d), left.shape[1] - max(0, -d))
        mixed[:, columns] += left[:, rows] * diagonal
    return mixed @ right
