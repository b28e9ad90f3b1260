"""Tests of paired differences over evaluation windows or samples: bootstrap interval, t-test, Holm
correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL, RESAMPLES, SEED = 0.05, 4999, 0


def estimate(samples: Sequence[np.ndarray], threshold: float = 0.0) -> tuple[float, float, float, float]:
    """Estimate (sum of the means of the samples, 95 % interval, two-sided p-value against
    ``threshold``).

    One sample holds differences of cells over the same items; two samples are independent, as those
    of two models are. Samples without spread give a certain result, a single item gives none.

    Intervals are BCa's for one sample (Efron, Journal of the American Statistical Association,
    1987), percentiles for two samples and if BCa is undefined.
    """
    # The import takes half a second, and tables need only Holm's correction.
    from scipy import stats

    effect = float(sum(sample.mean() for sample in samples))
    if min(map(len, samples)) < 2:
        return effect, -np.inf, np.inf, 1.0
    if all(np.ptp(sample) <= 1e-12 * max(1.0, abs(effect)) for sample in samples):
        return certain(effect, threshold)
    method = "BCa" if len(samples) == 1 and len(samples[0]) > 2 else "percentile"
    found = stats.bootstrap(
        tuple(samples),
        lambda *parts, axis: sum(part.mean(axis=axis) for part in parts),
        n_resamples=RESAMPLES,
        method=method,
        vectorized=True,
        batch=max(1, 10**7 // max(map(len, samples))),
        rng=np.random.default_rng(SEED),
    )
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():  # all resamples are equal
        low, high = np.quantile(found.bootstrap_distribution, [0.025, 0.975])
    if len(samples) == 1:
        p = stats.ttest_1samp(samples[0], threshold).pvalue
    else:
        p = stats.ttest_ind(samples[0], threshold - samples[1], equal_var=False).pvalue
    return effect, float(low), float(high), float(p)


def certain(effect: float, threshold: float = 0.0) -> tuple[float, float, float, float]:
    """Return the result of :func:`estimate` for a number that is known exactly."""
    return effect, effect, effect, 0.0 if effect != threshold else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm (Scandinavian Journal of Statistics, 1979)."""
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(
        1.0, np.maximum.accumulate([(len(values) - rank) * values[at] for rank, at in enumerate(order)])
    )
    result = np.empty(len(values))
    result[order] = scaled
    return result.tolist()
