"""The exponent with which something grows: offset + factor * (size / largest)**exponent, fitted to
measurements by least squares.

The offset is what a job takes whatever the size: start-up and what does not lie on the axis.
Deviations are relative to the measurements, for those at small sizes are as good as those at large
ones. Of offset and factor, both at least 0, the best are known for every exponent; exponents are
tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.arange(0.01, 5, 0.01)
NEGLIGIBLE = 0.03  # smallest share of growth in a measurement that is distinguishable from noise


@dataclass(frozen=True)
class Fit:
    """``offset`` and ``factor`` in the unit of what was measured, ``factor`` at the ``largest``
    size; ``error`` is the exponent's standard error."""

    offset: float
    factor: float
    exponent: float
    error: float
    largest: float

    @property
    def flat(self) -> bool:
        """Check whether too little is added up to the largest size for an exponent."""
        return self.factor < NEGLIGIBLE * (self.offset + self.factor)

    def __call__(self, size: float | np.ndarray) -> float | np.ndarray:
        return self.offset + self.factor * (np.asarray(size) / self.largest) ** self.exponent


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """The fit of ``values``, all above 0, that were measured at ``sizes``: at least four of them,
    for three numbers are fitted.

    Raises:
        ValueError: for fewer.
    """
    if len(set(sizes)) < 4:
        raise ValueError(f"a fit of offset, factor and exponent needs four sizes, got {sorted(set(sizes))}")
    x, y = np.asarray(sizes, float) / max(sizes), np.asarray(values, float)
    found = [(*_offset_and_factor(x**exponent, y), exponent) for exponent in EXPONENTS]
    offset, factor, exponent = min(found, key=lambda each: _deviations(x, y, *each) @ _deviations(x, y, *each))
    return Fit(offset, factor, exponent, _error(x, y, offset, factor, exponent), max(sizes))


def _deviations(x: np.ndarray, y: np.ndarray, offset: float, factor: float, exponent: float) -> np.ndarray:
    return (offset + factor * x**exponent) / y - 1


def _offset_and_factor(power: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Both at least 0, by least squares of deviations relative to ``y``."""
    columns = np.stack([1 / y, power / y], axis=1)
    offset, factor = np.linalg.lstsq(columns, np.ones_like(y))[0]
    if offset < 0:
        return 0.0, columns[:, 1].sum() / (columns[:, 1] @ columns[:, 1])
    if factor < 0:
        return columns[:, 0].sum() / (columns[:, 0] @ columns[:, 0]), 0.0
    return float(offset), float(factor)


def _error(x: np.ndarray, y: np.ndarray, offset: float, factor: float, exponent: float) -> float:
    """Standard error of the exponent, from the fit made linear in its three numbers."""
    slopes = np.stack([1 / y, x**exponent / y, factor * x**exponent * np.log(x) / y], axis=1)
    deviations = _deviations(x, y, offset, factor, exponent)
    return float(np.sqrt(np.linalg.pinv(slopes.T @ slopes)[2, 2] * (deviations @ deviations) / (len(y) - 3)))
