"""One figure per study: dots, bars, lines or a heat map of one metric, with 95 % intervals and the
full-precision baseline.

``points`` arranges a study's records as one row per mark, which is also the CSV of the figure;
``KINDS`` maps a spec's ``kind`` to the function that draws one panel of them. Failed cells are
crosses at the top edge and named under the figure, never left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...ground.errors import ConfigError, unknown_name
from ...ground.storage import replacing
from ..data.records import (
    AXES,
    FULL_PRECISION,
    check_axes,
    check_one_cell_each,
    check_one_protocol,
    datasets_of,
    is_baseline,
    left_over,
    order,
    says_failed,
    tidy,
)
from ..data.starts import HOLLOW, LEGEND
from ..style import CONFIDENCE, HEIGHT, METADATA, MUTED, STYLE, WIDTH, metric, metric_label, value_label
from .arrangement import arranged, in_every_panel, title
from .differences import SUFFIX, differences, differs
from .embedded import lean
from .heatmap import draw_colorbars, draw_heatmap
from .labels import fit
from .notes import needless, notes, unshown
from .panels import draw_bars, draw_dots, draw_lines
from .scene import Scene, clip, drawable

SETTINGS = {
    **{key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")},
    **STYLE,
}  # ignore the user's matplotlibrc
KINDS = {"dots": draw_dots, "bars": draw_bars, "lines": draw_lines, "heatmap": draw_heatmap}
SCALES = ("linear", "log")
LEGEND_CHARACTERS = 124  # characters in one row of the legend at 7 in, counting 8 for each handle


def points(records: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Build the marks of the figure, one row per cell: the five axes, then ``panel``, ``x``,
    ``series`` (labels), ``value``, ``stderr``, ``low`` and ``high`` (95 % interval; NaN without an
    error), ``status``, ``reason``, ``start_kept`` (True if a training of the cell kept its start),
    ``baseline``, and the rank of each label (``_position``).

    A metric with paired differences to full precision is drawn as these (:mod:`.differences`). An axis
    that varies without a place in the spec splits panels if it is the model, else the series; models
    are the series of a log axis where nothing else is.
    """
    records, key = tidy(records), f"{spec.get('study', 'study')}: figure"
    name, dataset, x, series, panel = layout(records, spec.get("figure") or {}, key)
    records = differences(records, name, dataset)
    check_one_cell_each(records, [x, *series, *panel], key)
    chosen = (records.metric == name) & (records.dataset == dataset)
    check_one_protocol(records[chosen], key)
    failed = pd.Series(
        [says_failed(record, name, dataset) for record in records.itertuples()], records.index, dtype=bool
    )
    failed &= ~records.cell.isin(records.cell[chosen])
    result = records.loc[
        chosen | failed, [*AXES, "cell", "value", "stderr", "status", "reason", "start_kept"]
    ].drop_duplicates("cell")
    result["baseline"], result["start_kept"] = is_baseline(result), result.start_kept == "all"
    margin = CONFIDENCE * result.stderr
    result["low"], result["high"] = result.value - margin, result.value + margin
    for column, axes in (("panel", panel), ("x", [x]), ("series", series)):
        result[column] = [
            ", ".join(value_label(axis, getattr(mark, axis)) for axis in axes) for mark in result.itertuples()
        ]
        ranks = pd.DataFrame(
            {axis: result[axis].map(order(records, axis, spec)).fillna(-1) for axis in axes}, index=result.index
        )
        result[f"{column}_position"] = ranks.apply(tuple, axis=1).rank(method="dense").astype(int) if axes else 0
    result = result if panel == ["model"] else in_every_panel(result, ["model"] if "model" in panel else [])
    return result.sort_values(["panel_position", "series_position", "x_position"], kind="stable").reset_index(drop=True)


def layout(records: pd.DataFrame, figure: Mapping[str, Any], key: str) -> tuple[str, str, str, list[str], list[str]]:
    """Resolve (metric, dataset, x axis, series axes, panel axes) of a figure's spec;
    :class:`ConfigError` names the invalid key."""
    for option, accepted in (("kind", KINDS), ("scale", SCALES)):
        if figure.get(option, "linear" if option == "scale" else None) not in accepted:
            raise ConfigError(f"{key}.{unknown_name(option, figure.get(option), accepted)}")
    if not figure.get("x") or not figure.get("metric"):
        raise ConfigError(f"{key}: needs 'x' (one of {', '.join(AXES)}) and 'metric'")
    named = [figure[option] for option in ("facet", "x", "hue") if figure.get(option)]
    extra = left_over(records, check_axes(named, key))
    panel = [*(axis for axis in extra if axis == "model"), *([figure["facet"]] if figure.get("facet") else [])]
    series = [*([figure["hue"]] if figure.get("hue") else []), *(axis for axis in extra if axis not in panel)]
    datasets = datasets_of(
        records, figure["metric"], [figure["dataset"]] if figure.get("dataset") else [], f"{key}.dataset"
    )
    if len(datasets) > 1:
        raise ConfigError(f"{key}.dataset: metric '{figure['metric']}' has several, name one of {', '.join(datasets)}")
    name = figure["metric"]
    absolute = metric(name).better and not metric(name).relative and not differs(records, name, datasets[0])
    if panel == ["model"] and figure.get("scale") == "log" and not absolute and not varies(records, series):
        panel, series = [], ["model"]
    return name, datasets[0], figure["x"], series, panel


def varies(records: pd.DataFrame, axes: list[str]) -> bool:
    """Check whether the quantized cells have several values on some of these axes."""
    quantized = records[~is_baseline(records)]
    return any(quantized[axis].nunique() > 1 for axis in axes)


def plot(records: pd.DataFrame, spec: Mapping[str, Any]) -> Figure:
    """Plot the figure of ``spec['figure']``: 7 in wide, 3.6 in high, and higher for further rows of
    panels."""
    marks, wanted = points(records, spec), spec["figure"]
    if marks.empty:
        raise ConfigError(f"{spec.get('study', 'study')}: figure: no cell has the metric '{wanted['metric']}'")
    left_out = needless(marks, wanted, paired(records, spec))
    hidden, marks = marks[left_out], marks[~left_out]
    places = arranged(marks, wanted.get("facet"))
    height, width = (1 + max(line) for line in zip(*places.values()))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT + 2.2 * (height - 1)), layout="constrained")
        FigureCanvasAgg(figure)
        scene = Scene.of(marks, wanted, (series_name(records, spec), value_name(records, spec)), width)
        shares = [
            max(len(scene.xs[name]) + 1 for name, place in places.items() if place[1] == column)
            for column in range(width)
        ]
        grid = figure.subplots(height, width, squeeze=False, width_ratios=shares)
        for name, place in places.items():
            KINDS[scene.kind](grid[place], marks[marks.panel == name], scene)
            grid[place].set_title(
                clip(title(name, places, wanted.get("facet"), marks), 78 * shares[place[1]] // sum(shares))
            )
        for place in np.ndindex(height, width):
            if place not in places.values():
                grid[place].set_axis_off()
        finish(
            figure, {place: grid[place] for place in places.values()}, scene, [*notes(marks, scene), *unshown(hidden)]
        )
    return figure


def value_name(records: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """Format the measured quantity with unit and dataset, and on a second line its better
    direction."""
    records = tidy(records)
    name, dataset, *_ = layout(records, spec["figure"], "figure")
    better, suffix = metric(name).better, SUFFIX if differs(records, name, dataset) else ""
    return textwrap.fill(metric_label(name, dataset) + suffix, 44) + (f"\n({better} is better)" if better else "")


def paired(records: pd.DataFrame, spec: Mapping[str, Any]) -> bool:
    """Check whether a figure draws paired differences to full precision."""
    records = tidy(records)
    name, dataset, *_ = layout(records, spec["figure"], "figure")
    return differs(records, name, dataset)


def series_name(records: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    return ", ".join(layout(tidy(records), spec["figure"], "figure")[3])


def finish(figure: Figure, panels: Mapping[tuple[int, int], Axes], scene: Scene, lines: list[str]) -> None:
    """Finish the figure: axis names at the outer panels, a legend above (or colour bars), notes
    below; then fit crowded labels."""
    heatmap, axes = scene.kind == "heatmap", list(panels.values())
    for (row, column), ax in panels.items():
        left, under = panels.get((row, column - 1)), panels.get((row + 1, column))
        below = under is None or names_below(under) != names_below(ax)
        alike = left is not None and (heatmap or left.get_ylim() == ax.get_ylim())
        ax.tick_params(labelbottom=below, labelleft=not alike, left=not alike and not heatmap)
        ax.set_xlabel(scene.x_name if below else "")
        ax.set_ylabel("" if left is not None else scene.series_name if heatmap else scene.value_name)
    if heatmap:
        draw_colorbars(figure, axes, scene)
    rows = draw_legend(figure, scene)
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=6.8, color=MUTED)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(rows - 1, 0) + 0.13 * max(len(lines) - 2, 0))
    fit(figure, axes, obstacles=not heatmap)


def names_below(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_xticklabels()]


def draw_legend(figure: Figure, scene: Scene) -> int:
    """Draw the legend above the panels, in one row if that fits; returns its number of rows, 0
    without a legend."""
    handles = scene.legend()
    if not handles:
        return 0
    lengths = [len(str(handle.get_label())) + 8 for handle in handles]
    columns = (
        len(handles)
        if sum(lengths) <= LEGEND_CHARACTERS
        else max(1, min(len(handles), LEGEND_CHARACTERS // max(lengths)))
    )
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, title=scene.series_name, title_fontsize=7.5
    )
    legend.set_alignment("left")
    return -(-len(handles) // columns)


def caption(records: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """Write the caption of the figure for the report."""
    marks, figure, records = points(records, spec), spec["figure"], tidy(records)
    name, dataset, x, series, _ = layout(records, figure, "figure")
    label, better = metric_label(name, dataset), metric(name).better
    label += f"{SUFFIX} (paired)" if differs(records, name, dataset) else ""
    by = " and ".join(filter(None, (", ".join([x, *series][:-1]), [x, *series][-1])))
    parts = [f"{label[0].upper()}{label[1:]} by {by}" + (f"; {better} is better." if better else ".")]
    if marks.stderr.gt(0).any() and figure["kind"] != "heatmap":
        parts.append("Error bars are 95 % confidence intervals (±1.96 standard errors).")
    drawn = marks.value[marks.baseline & ~needless(marks, figure, differs(records, name, dataset))]
    if drawable(drawn, figure.get("scale") == "log").any() and figure["kind"] != "heatmap":
        parts.append(f"The dashed line is {FULL_PRECISION}.")
    if marks.start_kept.any():
        parts.append(LEGEND if figure["kind"] == "heatmap" else HOLLOW)
    if (marks.status != "ok").any():
        parts.append(f"{(marks.status != 'ok').sum()} failed, marked ×.")
    return " ".join(parts)


def save(figure: Figure, paths: list[str | Path]) -> None:
    """Write the figure to each path (.png at 200 dpi, .pdf, .svg), the same bytes for the same
    figure, without dates. The layout is solved once, for the first path."""
    for path in map(Path, paths):
        if path.suffix not in METADATA:
            raise ConfigError(f"{path}: a figure is written as {', '.join(METADATA)}")
        with matplotlib.rc_context(SETTINGS), replacing(path) as temporary:
            figure.savefig(temporary, metadata=METADATA[path.suffix])
            figure.set_layout_engine("none")
            if path.suffix == ".svg":
                temporary.write_text(lean(temporary.read_text(encoding="utf-8")), encoding="utf-8")


def write_data(records: pd.DataFrame, spec: Mapping[str, Any], path: str | Path) -> None:
    """Write the figure's marks (see :func:`points`) as CSV."""
    with replacing(path) as temporary:
        points(records, spec).to_csv(temporary, index=False, lineterminator="\n")
