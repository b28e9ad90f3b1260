"""Records and values per window of a few invented cells of several kinds of deployment, for the tests of
the Pareto figure, of recommendations and of the report's first screen."""

from __future__ import annotations

import numpy as np
import pandas as pd

from quantgrid.reporting.data.records import AXES

WINDOWS = np.random.default_rng(0).normal(3.0, 0.4, 32)
# transform, mitigation, granularity, format, bits, divergence and loss above full precision, online
# operations
CELLS = {
    "b": ("none", "none", "-", "bf16", 16.0, 0.0, 0),
    "1": ("none", "rtn", "channel", "int4", 4.02, 0.5, 0),
    "2": ("turn", "gptq", "channel", "int4", 4.02, 0.2, 500),
    "3": ("turn", "gptq", "group-64", "int4", 4.25, 0.1, 500),
    "4": ("fold", "rtn", "group-64", "int4", 4.25, 0.1002, 0),
    "5": ("none", "gptq", "group-16", "nvfp4", 4.5, 0.15, 0),
    "6": ("none", "gptq", "group-16", "int8", 9.0, 0.01, 0),
    "7": ("none", "gptq", "group-64", "w4a16_g64", 4.25, 0.03, 0),
    "8": ("none", "rtn", "group-64", "w4a16_g64", 4.25, 0.06, 0),
    "9": ("turn", "gptq", "group-64", "w4a16_g64", 4.25, 0.02, 500),
}
METRICS = ("perplexity", "negative_log_likelihood", "kl_divergence")


def losses(number: int, above: float) -> tuple[np.ndarray, np.ndarray]:
    """Loss and divergence of every window, nats per token."""
    noise = np.random.default_rng(number).normal(0, 0.01, 32)
    noise -= noise.mean()
    return WINDOWS + above + noise, above * (1 + noise)


def results(model: str = "m", prefix: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """(records, items) of one model, the keys of its cells after ``prefix``."""
    rows, items, full = [], [], losses(0, 0.0)[0]
    for number, (key, (*axes, bits, above, online)) in enumerate(CELLS.items()):
        cell, (loss, divergence) = prefix + key, losses(number, above)
        common = {"cell": cell, **dict(zip(AXES, (model, *axes))), "status": "ok", "reason": "", "protocol": ""}
        common |= {"start_kept": "", "start_kept_parts": "", "count": 32}
        perplexity, excess = float(np.exp(loss.mean())), loss - full
        numbers = {"perplexity": (perplexity, perplexity * loss.std(ddof=1) / 32**0.5)}
        numbers["negative_log_likelihood"] = (loss.mean(), loss.std(ddof=1) / 32**0.5)
        numbers["kl_divergence"] = (divergence.mean(), divergence.std(ddof=1) / 32**0.5)
        for metric in METRICS:
            paired = {"difference": excess.mean(), "difference_stderr": excess.std(ddof=1) / 32**0.5}
            own = paired if metric == "negative_log_likelihood" else {}
            value, error = numbers[metric]
            rows.append({**common, "metric": metric, "dataset": "docs", "value": value, "stderr": error, **own})
        for metric, value in (("stored_bits_per_weight", bits), ("online_operations_per_token", online)):
            rows.append({**common, "metric": metric, "dataset": "", "value": value})
        items += [
            {"cell": cell, "metric": metric, "dataset": "docs", "item": at, "value": value}
            for metric, values in (("negative_log_likelihood", loss), ("kl_divergence", divergence))
            for at, value in enumerate(values)
        ]
    names = ("value", "stderr", "difference", "difference_stderr")
    frame = pd.DataFrame(rows).assign(unit="")
    return frame.assign(**{name: pd.to_numeric(frame[name]) for name in names}), pd.DataFrame(items)
