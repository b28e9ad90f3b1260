"""Means with standard errors, and paired differences of cells. Standard library only.

Pairs are results on the same windows or samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; the error of a single value is None."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def perplexity(losses: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity, exp of the mean loss (nats per token) over windows, and its standard error.

    The error uses the delta method.
    """
    mean, error = mean_and_error(losses)
    value = math.exp(min(mean, 700.0))
    return value, None if error is None else value * error


def paired_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Mean of values - others, item by item, and its standard error."""
    return mean_and_error([a - b for a, b in zip(values, others, strict=True)])


def perplexity_difference(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Difference of two perplexities on the same windows, and its standard error.

    The error linearizes exp at each mean and keeps the pairing.
    """
    value, _ = perplexity(losses)
    other, _ = perplexity(others)
    _, error = paired_difference([value * loss for loss in losses], [other * loss for loss in others])
    return value - other, error
