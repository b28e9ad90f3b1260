"""Lines under a study's figure: what its error bars are, which cells failed, and what is not drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .panels import Scene, clip
from .records import FULL_PRECISION
from .starts import HOLLOW, LEGEND
from .style import metric, significant

NAMED_FAILURES = 6  # failed cells that the figure names; the table's footnotes name all


def beside_the_point(marks: pd.DataFrame, figure: Mapping[str, Any]) -> bool:
    """Whether full precision is what all marks are compared with already, so that a line for it would only take up the axis."""
    return metric(figure["metric"]).relative and figure["kind"] != "heatmap" and bool((~marks.baseline).any())


def unshown(baselines: pd.DataFrame) -> list[str]:
    """A line under the figure with the values of the ``baselines`` that are not drawn."""
    values = baselines.drop_duplicates("cell")
    values = values[values.value.notna()]
    named = [significant(mark.value) + (f" ({mark.model})" if len(values) > 1 else "") for mark in values.itertuples()]
    return textwrap.wrap(f"Full precision, measured like a cell: {', '.join(named)}; not drawn.", 128) if named else []


def notes(marks: pd.DataFrame, scene: Scene) -> list[str]:
    """Lines under the figure: what the bars are, which cells failed or kept the start of a training, which values a log axis cannot show."""
    starts = textwrap.wrap(LEGEND if scene.kind == "heatmap" else HOLLOW, 128) if scene.start_kept else []
    if scene.kind == "heatmap":  # its cells say themselves what failed
        return [*(["±: half of the 95 % confidence interval (1.96 standard errors)."] if marks.stderr.gt(0).any() else []), *starts]
    lines = ["Error bars: 95 % confidence interval (±1.96 standard errors)."] if marks.stderr.gt(0).any() else []
    if scene.kind == "bars" and scene.log:
        lines = [f"Bars stand on {FULL_PRECISION if scene.baseline else 'the edge of the axis'}. {' '.join(lines)}".strip()]
    lines += starts
    hidden = marks[scene.log & marks.value.le(0) & ~marks.baseline]
    for text, part in (("× failed: ", marks[marks.status != "ok"]), ("Not above 0, so not on this log axis: ", hidden)):
        cells = [describe(mark) for mark in part.itertuples()]
        more = f"; and {len(cells) - NAMED_FAILURES} more" if len(cells) > NAMED_FAILURES else ""
        if cells:
            lines += textwrap.wrap(text + "; ".join(cells[:NAMED_FAILURES]) + more, 128)
    return lines


def describe(mark: Any) -> str:
    """``series + x + panel`` of one mark, as the figure labels them."""
    return FULL_PRECISION if mark.baseline else " + ".join(clip(name, 44) for name in (mark.series, mark.x, mark.panel) if name)
