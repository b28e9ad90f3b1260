"""How the inputs and weights of every site are distributed once a transform is folded in and before anything is rounded.

Two tensors of each site and layer are described: ``inputs``, the tokens (tokens, n) that calibration kept, as the transform and its online
operations leave them; ``weights``, the rows (m, n) of all linears that read the site. The tokens hold the first of a window and those of
largest norm always, so they are no plain sample of the text; they are the same for every transform, so that transforms compare. Largest
magnitudes of inputs are those of these tokens and may be exceeded by others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architecture import SITES
from .decoders import DecoderFolder, DecoderLayer
from .errors import NumericalFailure
from .transforms.composition import Transform, layer_state

BINS = 256  # largest number of places into which the channels of a site are gathered
DIGITS = 5  # significant digits of what is drawn as colour


def describe(decoder: DecoderFolder, transform: Transform, statistics: str | Path, progress: Callable[[Iterable], Iterable] = iter) -> dict[str, Any]:
    """The measures of :func:`measures` as lists over layers: ``inputs`` and ``weights`` -> site -> measure, and the ``sites`` with their
    ``channels`` and ``channels_per_bin``. One layer is held at a time.

    Raises :class:`NumericalFailure` where a tensor holds NaN or infinity.
    """
    sizes = {site: decoder.shape.site_size(site) for site in SITES}
    sites = {site: {"channels": size, "channels_per_bin": -(-size // BINS)} for site, size in sizes.items()}
    found: dict[str, dict[str, dict[str, list]]] = {tensor: {site: {} for site in SITES} for tensor in ("inputs", "weights")}
    for index in progress(range(decoder.shape.layers)):
        layer = layer_state(decoder, index, statistics)
        transform.fold_layer(layer)
        for site in SITES:
            for tensor, rows in tensors_of(layer, site).items():
                if not torch.isfinite(rows).all():
                    raise NumericalFailure(f"layers.{index}.{site}: the transformed {tensor} hold NaN or infinity")
                for name, value in measures(rows, sites[site]["channels_per_bin"]).items():
                    found[tensor][site].setdefault(name, []).append(value)
    return {"sites": sites, **found}


def tensors_of(layer: DecoderLayer, site: str) -> dict[str, Tensor]:
    """``inputs`` (tokens, n) and ``weights`` (m, n) of a site in float64, n channels."""
    return {"inputs": layer.statistics[site].samples.double(), "weights": torch.cat([layer.weights[linear] for linear in SITES[site]])}


def measures(rows: Tensor, channels_per_bin: int) -> dict[str, Any]:
    """What is kept of ``rows`` (rows, n):

    ``kurtosis`` of all values as one population; ``row_kurtosis``, the median over rows (tokens, or output channels) of the kurtosis along a
    row, which is what one scale per row meets; ``peak_to_median``, the largest channel maximum over the median one; ``maximum`` (bins),
    the largest magnitude of every run of ``channels_per_bin`` channels, to ``DIGITS`` digits. None where a number does not exist.
    """
    largest = rows.abs().amax(0)
    binned = [run.max().item() for run in largest.split(channels_per_bin)]
    return {"kurtosis": _number(kurtosis(rows.flatten())), "row_kurtosis": _number(kurtosis(rows).nanquantile(0.5)),
            "peak_to_median": _number(largest.max() / largest.quantile(0.5)), "maximum": [float(f"{value:.{DIGITS}g}") for value in binned]}


def kurtosis(x: Tensor) -> Tensor:
    """Fourth central moment over the squared variance along the last dimension of ``x`` (*batch, n): (*batch), 3 of a normal distribution (not
    the excess), at most n - 2 + 1/(n - 1). Both moments are means over n (Pearson's β₂; SciPy's ``kurtosis(fisher=False)``); NaN
    where all values are equal."""
    squares = (x - x.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1)
    return squares.square_().mean(-1) / variance.square()


def _number(value: Tensor) -> float | None:
    return value.item() if math.isfinite(value.item()) else None
