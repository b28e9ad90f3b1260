"""Outputs of ``measure_distributions``: reading, and tables of the numbers in the figures of
distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...ground.errors import ConfigError
from ...ground.storage import read_json
from ...learning import outcomes
from ...models.plans import SITES
from ..style import value_label
from .starts import WORDS

MEASURES = (
    "kurtosis",
    "row_kurtosis",
    "peak_to_median",
)  # one number per layer; see quantgrid.quantization.distributions
# per layer and for both tensors; see quantgrid.quantization.distributions.trace_excesses
EXCESSES = tuple(f"{name}_{block}" for block in (16, 32) for name in ("trace_excess", "largest_trace_excess"))


@dataclass(frozen=True)
class Description:
    """One transform of one model: its label, and its measures or the reason of its failure."""

    label: str
    content: dict[str, Any]
    reason: str = ""

    def maxima(self, tensor: str, site: str) -> np.ndarray:
        """Return the largest magnitudes (layers, bins)."""
        return np.array(self.content[tensor][site]["maximum"])


def read(paths: Sequence[str | Path]) -> list[Description]:
    """Read the descriptions at ``paths`` in their order; labels name the scheme of a transform
    fitted to one, and a training that kept its start."""
    found = []
    for path in paths:
        content = read_json(path)
        if (
            content.get("status") != "failed"
            and not {
                "inputs",
                "weights",
                "sites",
                "trace_excess",
            }
            <= content.keys()
        ):
            raise ConfigError(f"{path}: not a description of a transform; delete it and run again")
        axes = content["axes"]
        target = f" ({axes['target']})" if axes["target"] != "any" else ""
        kept = f" ({WORDS})" if outcomes.columns(content.get("trainings", {}))["start_kept"] == "all" else ""
        found.append(
            Description(value_label("transform", axes["transform"]) + target + kept, content, content.get("reason", ""))
        )
    return found


def shape_table(descriptions: Sequence[Description], tensor: str) -> pd.DataFrame:
    """Build a row per transform, site and layer: both kurtoses, and the ratio of the largest to the
    median channel maximum; one empty row for a failed transform."""
    return _layer_table(descriptions, tensor, MEASURES)


def excess_table(descriptions: Sequence[Description]) -> pd.DataFrame:
    """Build a row per transform, site and layer: the product of the traces of both second moments over its
    lower bound at two block sizes, of the site and of its worst block; one empty row for a failed transform."""
    return _layer_table(descriptions, "trace_excess", EXCESSES)


def _layer_table(descriptions: Sequence[Description], part: str, measures: Sequence[str]) -> pd.DataFrame:
    """Build a row per transform, site and layer of the ``measures`` in ``part`` of the descriptions."""
    frames = []
    for described in descriptions:
        for site in [""] if described.reason else SITES:
            found = described.content[part][site] if site else {}
            numbers = {name: np.array(found.get(name, [np.nan]), dtype=float) for name in measures}
            layers = range(len(numbers[measures[0]])) if site else [pd.NA]
            frames.append(
                pd.DataFrame(
                    {"transform": described.label, "site": site, "layer": pd.array(layers, "Int64"), **numbers}
                )
            )
    return pd.concat(frames, ignore_index=True)


def maxima_table(descriptions: Sequence[Description], tensor: str, site: str) -> pd.DataFrame:
    """Build a row per transform and layer, a column per run of channels, named by its first: the
    largest magnitude in it."""
    frames = []
    for described in (described for described in descriptions if not described.reason):
        maxima, step = described.maxima(tensor, site), described.content["sites"][site]["channels_per_bin"]
        table = pd.DataFrame(maxima, columns=[str(position * step) for position in range(maxima.shape[1])])
        frames.append(
            pd.concat([pd.DataFrame({"transform": described.label, "layer": range(len(maxima))}), table], axis=1)
        )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["transform", "layer"])
