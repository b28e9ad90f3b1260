"""Number lines of four 4-bit formats: representable values of one block, given its largest
magnitude.

INT4 and FP4 (E2M1) with a full-precision scale represent the largest magnitude exactly. MXFP4 (OCP
Microscaling v1.0) has a power-of-two scale by the floor rule: the largest magnitude may exceed the
last value, or leave it unused. NVFP4 rounds its scale to E4M3, relative to the largest magnitude of
the whole tensor (``TENSOR_MAXIMUM``). Values come from ``number_formats.py``; this module quantizes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...schemes.number_formats import ELEMENT_FORMATS, SCALE_FORMATS
from ..style import INK, MUTED, PALETTE, WIDTH
from .study_figures import SETTINGS

MAXIMA = (
    1.0,
    1.2,
    1.9,
)  # largest magnitudes of the blocks shown: at, just above and just below a power of two
TENSOR_MAXIMUM = 4.0
E2M1_MAXIMUM, E2M1_EXPONENT, E4M3_MAXIMUM = 6.0, 2, 448.0
GLOBAL_SCALE = TENSOR_MAXIMUM / (E2M1_MAXIMUM * E4M3_MAXIMUM)
CAPTION = (
    "Representable values of an element in a block whose largest magnitude is 1, 1.2 or 1.9 (dashed). INT4 is evenly "
    "spaced and reaches one step "
    "further below zero; the others hold E2M1, dense near zero, with scales of full precision (FP4), powers of two by "
    "the floor rule (MXFP4) "
    "and E4M3 (NVFP4, in a tensor with a largest magnitude of 4). Where the last value lies inside the "
    "dashed lines, the largest "
    "magnitudes saturate."
)


def nearest_e4m3(value: float) -> float:
    """Round to the nearest positive E4M3 value, ties to the even code."""
    codes = [(code, level) for code, level in enumerate(SCALE_FORMATS["e4m3"].values()) if level > 0]
    return min(codes, key=lambda pair: (abs(pair[1] - value), pair[0] % 2))[1]


SCALES: dict[str, tuple[str, Callable[[float], float]]] = {
    "INT4": ("int4", lambda largest: largest / 7),
    "FP4": ("e2m1", lambda largest: largest / E2M1_MAXIMUM),
    "MXFP4": ("e2m1", lambda largest: 2.0 ** (math.floor(math.log2(largest)) - E2M1_EXPONENT)),
    "NVFP4": ("e2m1", lambda largest: GLOBAL_SCALE * nearest_e4m3(largest / E2M1_MAXIMUM / GLOBAL_SCALE)),
}


def table() -> pd.DataFrame:
    """Build one row per format, block and value: format, largest, scale, value, in ascending
    order."""
    rows = []
    for largest in MAXIMA:
        for name, (element, scale_of) in SCALES.items():
            scale = scale_of(largest)
            values = sorted(set(ELEMENT_FORMATS[element].values()))
            rows += [{"format": name, "largest": largest, "scale": scale, "value": scale * value} for value in values]
    return pd.DataFrame(rows)


def plot() -> Figure:
    """Plot one panel per block, one line per format, a tick per value; the largest magnitude
    dashed."""
    values = table()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 1.25 * len(MAXIMA) + 0.2), layout="constrained")
        FigureCanvasAgg(figure)
        for ax, largest in zip(np.atleast_1d(figure.subplots(len(MAXIMA), 1, sharex=True)), MAXIMA):
            for row, (_, part) in enumerate(values[values.largest == largest].groupby("format", sort=False)):
                ax.hlines(-row, part.value.min(), part.value.max(), color=PALETTE[row], linewidth=0.8)
                ax.plot(
                    part.value, np.full(len(part), -row), "|", color=PALETTE[row], markersize=11, markeredgewidth=1.4
                )
            ax.vlines([-largest, largest], -len(SCALES) + 0.5, 0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            ax.set_yticks([-row for row in range(len(SCALES))], list(SCALES))
            ax.set_ylim(-len(SCALES) + 0.4, 0.6)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.set_title(f"largest magnitude {largest:g}")
        ax.set_xlabel("value")
        ax.xaxis.label.set_color(MUTED)
    return figure
