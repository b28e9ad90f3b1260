"""Distributions of the inputs and weights of every site, after the transform and before rounding.

Two tensors of each site and layer are described. ``inputs`` are the calibration tokens (tokens, n)
after the transform and its online operations. ``weights`` are the rows (m, n) of all linears that
read the site. The token sample always contains the first token of a window and the tokens of
largest norm, so it is not a uniform sample of the text. It is the same for every transform, so
transforms compare. Largest magnitudes of inputs are over these tokens; other tokens may exceed
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.layers import DecoderFolder, DecoderLayer
from ..ground.errors import NumericalFailure
from ..inference.transform import Transform, layer_state
from ..linalg.blocks import trace_products
from ..models.plans import SITES

BINS = 256  # largest number of bins that the channels of a site are grouped into
BLOCKS = (16, 32)  # channels of a block in NVFP4 and in the MX formats
DIGITS = 5  # significant digits of values drawn as colour


def describe(
    decoder: DecoderFolder,
    transform: Transform,
    statistics: str | Path,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Compute :func:`measures` as lists over layers: ``inputs`` and ``weights`` -> site -> measure.

    Every layer has one site of each kind (:attr:`~quantgrid.models.shapes.ModelShape.has_plain_sites`).
    The result also holds ``sites`` with their ``channels`` and ``channels_per_bin``, and ``trace_excess``:
    site -> :func:`trace_excesses`, as lists over layers. One layer is in memory at a time.

    Raises :class:`NumericalFailure` where a tensor holds NaN or infinity.
    """
    names = tuple(SITES)
    sizes = {site: decoder.shape.site_size(site) for site in names}
    sites = {site: {"channels": size, "channels_per_bin": -(-size // BINS)} for site, size in sizes.items()}
    found: dict[str, dict[str, dict[str, list]]] = {
        part: {site: {} for site in names} for part in ("inputs", "weights", "trace_excess")
    }
    for index in progress(range(decoder.shape.layers)):
        layer = layer_state(decoder, index, statistics)
        transform.fold_layer(layer)
        for site in names:
            tensors = tensors_of(layer, site)
            for tensor, rows in tensors.items():
                if not torch.isfinite(rows).all():
                    raise NumericalFailure(f"layers.{index}.{site}: the transformed {tensor} hold NaN or infinity")
                _append(found[tensor][site], measures(rows, sites[site]["channels_per_bin"]))
            excesses = trace_excesses(layer.statistics[site].second_moment, tensors["weights"])
            _append(found["trace_excess"][site], excesses)
    return {"sites": sites, **found}


def tensors_of(layer: DecoderLayer, site: str) -> dict[str, Tensor]:
    """``inputs`` (tokens, n) and ``weights`` (m, n) of a site in float64, n channels."""
    return {
        "inputs": layer.statistics[site].samples.double(),
        "weights": torch.cat([layer.weights[linear] for linear in layer.plan.sites[site].linears]),
    }


def measures(rows: Tensor, channels_per_bin: int) -> dict[str, Any]:
    """Distribution measures of ``rows`` (rows, n); None where a number does not exist.

    ``kurtosis``: of all values as one population. ``row_kurtosis``: median over rows (tokens, or
    output channels) of the kurtosis along a row, the distribution that one scale per row has to
    cover. ``peak_to_median``: largest channel maximum over the median one. ``maximum`` (bins):
    largest magnitude of each run of ``channels_per_bin`` channels, to ``DIGITS`` digits.
    """
    largest = rows.abs().amax(0)
    binned = [run.max().item() for run in largest.split(channels_per_bin)]
    return {
        "kurtosis": _number(kurtosis(rows.flatten())),
        "row_kurtosis": _number(kurtosis(rows).nanquantile(0.5)),
        "peak_to_median": _number(largest.max() / largest.quantile(0.5)),
        "maximum": [float(f"{value:.{DIGITS}g}") for value in binned],
    }


def trace_excesses(moment: Tensor, weights: Tensor) -> dict[str, float | None]:
    """Products of the traces of both second moments over their lower bounds, at each block size of ``BLOCKS``.

    ``moment`` (n, n) is that of a site's inputs, ``weights`` (m, n) are the rows of all its linears; see
    :func:`~quantgrid.linalg.blocks.trace_products`. ``trace_excess_{size}``: sum of the products over the sum of
    the bounds. Where errors of rounding are proportional to the traces, the output error of the site is a sum of
    such products over its blocks, and this is its factor above the least. ``largest_trace_excess_{size}``: the
    largest ratio of a block. A block whose bound is 0 has no ratio, but its product counts in the sum. None
    without a bound above 0, and where the block size does not divide n.
    """
    found: dict[str, float | None] = {}
    for size in BLOCKS:
        ratio = largest = None
        if moment.shape[-1] % size == 0:
            products, bounds = trace_products(moment, [weights], size)
            ratio = _number(products.sum() / bounds.sum())
            largest = _number((products / bounds).where(bounds > 0, -math.inf).max())
        found |= {f"trace_excess_{size}": ratio, f"largest_trace_excess_{size}": largest}
    return found


def _append(lists: dict[str, list], values: dict[str, Any]) -> None:
    for name, value in values.items():
        lists.setdefault(name, []).append(value)


def kurtosis(x: Tensor) -> Tensor:
    """Kurtosis along the last dimension of ``x`` (*batch, n): (*batch).

    Fourth central moment over the squared variance, both means over n (Pearson's β₂; SciPy's
    ``kurtosis(fisher=False)``): 3 for a normal distribution (not the excess), at most n - 2 + 1/(n
    - 1), NaN where all values are equal.
    """
    squares = (x - x.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1)
    return squares.square_().mean(-1) / variance.square()


def _number(value: Tensor) -> float | None:
    return value.item() if math.isfinite(value.item()) else None
