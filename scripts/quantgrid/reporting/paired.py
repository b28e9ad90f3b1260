"""Tests of differences that are paired over evaluation windows or samples: interval by bootstrap, p-value by t test, correction by Holm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL, RESAMPLES, SEED = 0.05, 4999, 0


def estimate(differences: np.ndarray) -> tuple[float, float, float, float]:
    """(mean, 95 % interval, two-sided p-value against 0) of differences over items.

    Without any spread the number itself decides, a single one decides nothing.

    The interval is BCa's (Efron, Journal of the American Statistical Association, 1987), percentiles where that has no answer.
    """
    effect = float(differences.mean())
    if len(differences) < 2:
        return effect, -np.inf, np.inf, 1.0
    if np.ptp(differences) <= 1e-12 * max(1.0, abs(effect)):
        return effect, effect, effect, 0.0 if effect else 1.0
    method = "BCa" if len(differences) > 2 else "percentile"
    found = stats.bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method=method, vectorized=True,
                            batch=max(1, 10**7 // len(differences)), rng=np.random.default_rng(SEED))
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():  # all resamples agree
        low, high = np.quantile(found.bootstrap_distribution, [0.025, 0.975])
    return effect, float(low), float(high), float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm (Scandinavian Journal of Statistics, 1979)."""
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(1.0, np.maximum.accumulate([(len(values) - rank) * values[at] for rank, at in enumerate(order)]))
    result = np.empty(len(values))
    result[order] = scaled
    return result.tolist()
