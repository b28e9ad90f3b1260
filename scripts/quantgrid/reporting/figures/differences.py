"""Paired differences to full precision as the values of a figure.

Two cells share their windows, so the difference to full precision varies far less than the values:
intervals of values overlap where their differences are clear.
"""

from __future__ import annotations

import pandas as pd

from ..data.records import is_baseline
from ..style import metric

SUFFIX = ", less that of full precision"


def differs(records: pd.DataFrame, name: str, dataset: str) -> bool:
    """Check whether a metric is drawn as its paired difference to full precision: it is better in one
    direction, compares with nothing yet, and every quantized cell has the difference."""
    own = records[(records.metric == name) & (records.dataset == dataset)]
    quantized = own[~is_baseline(own)]
    known = metric(name)
    return bool(known.better and not known.relative and len(quantized) and quantized.difference.notna().all())


def differences(records: pd.DataFrame, name: str, dataset: str) -> pd.DataFrame:
    """Replace value and standard error of the quantized cells by those of the paired difference, if the
    metric is drawn so (:func:`differs`); baselines keep theirs."""
    if not differs(records, name, dataset):
        return records
    chosen = (records.metric == name) & (records.dataset == dataset) & ~is_baseline(records)
    changed = records.copy()
    changed.loc[chosen, "value"] = records.difference[chosen]
    changed.loc[chosen, "stderr"] = records.difference_stderr[chosen]
    return changed
