"""Notes under a study's figure: meaning of its error bars, failed cells, and values not drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..data.records import FULL_PRECISION
from ..data.starts import HOLLOW, LEGEND
from ..style import metric, significant
from .scene import Scene, clip

NAMED_FAILURES = 6  # failed cells named in the figure; the table's footnotes name all


def needless(marks: pd.DataFrame, figure: Mapping[str, Any], paired: bool) -> pd.Series:
    """Mark the baselines that are not drawn while there are quantized cells: all if the metric, or the
    ``paired`` differences in its place, compare with full precision already, else those of panels in
    which no quantized cell is done."""
    quantized = marks[~marks.baseline]
    if quantized.empty:
        return marks.baseline & False
    relative = (paired or metric(figure["metric"]).relative) and figure["kind"] != "heatmap"
    return marks.baseline & (relative | ~marks.panel.isin(quantized.panel))


def unshown(baselines: pd.DataFrame) -> list[str]:
    """Write lines under the figure with the ``baselines`` that are not drawn: values, and models
    whose baseline failed."""
    cells = baselines.drop_duplicates("cell")
    values, failed = cells[cells.value.notna()], cells[cells.status != "ok"]
    named = [significant(mark.value) + (f" ({mark.model})" if len(values) > 1 else "") for mark in values.itertuples()]
    lines = [f"Full precision, measured like a cell: {', '.join(named)}; not drawn."] if named else []
    lines += [f"× failed at full precision: {', '.join(failed.model)}; not drawn."] if len(failed) else []
    return [part for line in lines for part in textwrap.wrap(line, 128)]


def notes(marks: pd.DataFrame, scene: Scene) -> list[str]:
    """Write the lines under the figure: meaning of the bars, cells that failed or kept the start of
    a training, values not representable on a log axis."""
    starts = textwrap.wrap(LEGEND if scene.kind == "heatmap" else HOLLOW, 128) if scene.start_kept else []
    if scene.kind == "heatmap":  # its cells show the failed ones
        return [
            *(["±: half of the 95 % confidence interval (1.96 standard errors)."] if marks.stderr.gt(0).any() else []),
            *starts,
        ]
    lines = ["Error bars: 95 % confidence interval (±1.96 standard errors)."] if marks.stderr.gt(0).any() else []
    if scene.kind == "bars" and scene.log:
        lines = [
            f"Bars stand on {FULL_PRECISION if scene.baseline else 'the edge of the axis'}. {' '.join(lines)}".strip()
        ]
    lines += starts
    hidden = marks[scene.log & marks.value.le(0) & ~marks.baseline]
    for text, part in (("× failed: ", marks[marks.status != "ok"]), ("Not above 0, so not on this log axis: ", hidden)):
        cells = [describe(mark) for mark in part.itertuples()]
        more = f"; and {len(cells) - NAMED_FAILURES} more" if len(cells) > NAMED_FAILURES else ""
        if cells:
            lines += textwrap.wrap(text + "; ".join(cells[:NAMED_FAILURES]) + more, 128)
    return lines


def describe(mark: Any) -> str:
    """Format ``series + x + panel`` of one mark with the labels of the figure."""
    return (
        FULL_PRECISION
        if mark.baseline
        else " + ".join(clip(name, 44) for name in (mark.series, mark.x, mark.panel) if name)
    )
