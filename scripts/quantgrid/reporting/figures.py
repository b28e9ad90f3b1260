"""One figure per study: dots, bars, lines or a heat map of one metric, with 95 % intervals and the full-precision baseline.

``points`` arranges a study's records as one row per mark, which is also the CSV beside the figure; ``KINDS`` maps a spec's ``kind`` to
the function that draws one panel of them. Failed cells are crosses at the top edge and named under the figure, never left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..errors import ConfigError, unknown_name
from ..storage import replacing
from .labels import fit
from .panels import SHADES, Scene, clip, draw_bars, draw_dots, draw_heatmap, draw_lines, drawable, scale_ticks
from .records import AXES, FULL_PRECISION, check_axes, check_one_cell_each, datasets_of, is_baseline, left_over, order, tidy
from .style import CONFIDENCE, HEATMAP, HEIGHT, METADATA, MUTED, STYLE, WIDTH, metric, metric_label, value_label

SETTINGS = {**{key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}, **STYLE}  # nobody's matplotlibrc
KINDS = {"dots": draw_dots, "bars": draw_bars, "lines": draw_lines, "heatmap": draw_heatmap}
SCALES = ("linear", "log")
LEGEND_CHARACTERS = 124  # that fit into one row of the legend at 7 in, counting 8 for each handle
NAMED_FAILURES = 6  # failed cells that the figure names; the table's footnotes name all


def points(records: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """The marks of the figure, one row per cell: the five axes, then ``panel``, ``x``, ``series`` (labels), ``value``, ``stderr``,
    ``low`` and ``high`` (95 % interval; NaN without an error), ``status``, ``reason``, ``baseline``, and the rank of each label (``_position``).

    An axis that varies but that the spec does not name splits panels if it is the model (and no facet is set), else the series.
    """
    records, key = tidy(records), f"{spec.get('study', 'study')}: figure"
    name, dataset, x, series, panel = layout(records, spec.get("figure") or {}, key)
    check_one_cell_each(records, [x, *series, *panel], key)
    chosen = (records.metric == name) & (records.dataset == dataset)
    failed = (records.metric == "") & (records.status != "ok") & ~records.cell.isin(records.cell[chosen])
    result = records.loc[chosen | failed, [*AXES, "cell", "value", "stderr", "status", "reason"]].copy()
    result["baseline"] = is_baseline(result)
    margin = CONFIDENCE * result.stderr
    result["low"], result["high"] = result.value - margin, result.value + margin
    for column, axes in (("panel", panel), ("x", [x]), ("series", series)):
        result[column] = [", ".join(value_label(axis, getattr(mark, axis)) for axis in axes) for mark in result.itertuples()]
        ranks = pd.DataFrame({axis: result[axis].map(order(records, axis)).fillna(-1) for axis in axes}, index=result.index)
        result[f"{column}_position"] = ranks.apply(tuple, axis=1).rank(method="dense").astype(int) if axes else 0
    result = result if "model" in panel else in_every_panel(result)
    return result.sort_values(["panel_position", "series_position", "x_position"], kind="stable").reset_index(drop=True)


def in_every_panel(marks: pd.DataFrame) -> pd.DataFrame:
    """Baselines repeated in every panel of quantized cells, instead of a panel of their own; as they are where nothing is quantized."""
    quantized = marks[~marks.baseline]
    panels = quantized[["panel", "panel_position"]].drop_duplicates()
    if panels.empty:
        return marks
    return pd.concat([marks[marks.baseline].drop(columns=["panel", "panel_position"]).merge(panels, how="cross"), quantized])


def layout(records: pd.DataFrame, figure: Mapping[str, Any], key: str) -> tuple[str, str, str, list[str], list[str]]:
    """(metric, dataset, x axis, series axes, panel axes) of a figure's spec; :class:`ConfigError` naming the key that is wrong."""
    for option, accepted in (("kind", KINDS), ("scale", SCALES)):
        if figure.get(option, "linear" if option == "scale" else None) not in accepted:
            raise ConfigError(f"{key}.{unknown_name(option, figure.get(option), accepted)}")
    if not figure.get("x") or not figure.get("metric"):
        raise ConfigError(f"{key}: needs 'x' (one of {', '.join(AXES)}) and 'metric'")
    named = [figure[option] for option in ("facet", "x", "hue") if figure.get(option)]
    extra = left_over(records, check_axes(named, key))
    panel = [figure["facet"]] if figure.get("facet") else [axis for axis in extra if axis == "model"]
    series = [*([figure["hue"]] if figure.get("hue") else []), *(axis for axis in extra if axis not in panel)]
    datasets = datasets_of(records, figure["metric"], [figure["dataset"]] if figure.get("dataset") else [], f"{key}.dataset")
    if len(datasets) > 1:
        raise ConfigError(f"{key}.dataset: metric '{figure['metric']}' has several, name one of {', '.join(datasets)}")
    return figure["metric"], datasets[0], figure["x"], series, panel


def plot(records: pd.DataFrame, spec: Mapping[str, Any]) -> Figure:
    """The figure that ``spec['figure']`` asks for: 7 in wide, 3.6 in high, and higher by further rows of panels."""
    marks, wanted = points(records, spec), spec["figure"]
    if marks.empty:
        raise ConfigError(f"{spec.get('study', 'study')}: figure: no cell has the metric '{wanted['metric']}'")
    names = list(dict.fromkeys(marks.panel))
    width = 2 if len(names) == 4 else min(len(names), 3)
    height = -(-len(names) // width)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT + 2.2 * (height - 1)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(height, width, squeeze=False).flat)
        scene = Scene.of(marks, wanted, (series_name(records, spec), value_name(records, spec)))
        for ax, name in zip(axes, names):
            KINDS[scene.kind](ax, marks[marks.panel == name], scene)
            ax.set_title(clip(name, 66 // width))
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        finish(figure, axes[: len(names)], width, scene, notes(marks, scene))
    return figure


def value_name(records: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """The measured quantity with unit and dataset, and on a line of its own which direction is better."""
    name, dataset, *_ = layout(tidy(records), spec["figure"], "figure")
    better = metric(name).better
    return textwrap.fill(metric_label(name, dataset), 44) + (f"\n({better} is better)" if better else "")


def series_name(records: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    return ", ".join(layout(tidy(records), spec["figure"], "figure")[3])


def finish(figure: Figure, axes: list[Axes], width: int, scene: Scene, lines: list[str]) -> None:
    """Axis names at the outer panels, a legend above (or a colour bar), the notes below; then fit crowded labels."""
    heatmap = scene.kind == "heatmap"
    for position, ax in enumerate(axes):
        first, below = position % width == 0, position + width >= len(axes)
        ax.tick_params(labelbottom=below, labelleft=first, left=first and not heatmap)
        ax.set_xlabel(scene.x_name if below else "")
        ax.set_ylabel("" if not first else scene.series_name if heatmap else scene.value_name)
    if heatmap:
        draw_colorbar(figure, axes, scene)
    rows = draw_legend(figure, scene)
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=6.8, color=MUTED)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(rows - 1, 0) + 0.13 * max(len(lines) - 2, 0))
    fit(figure, axes, obstacles=not heatmap)


def draw_legend(figure: Figure, scene: Scene) -> int:
    """The legend above the panels, in one row if that fits; returns its number of rows, 0 without a legend."""
    handles = scene.legend()
    if not handles:
        return 0
    lengths = [len(str(handle.get_label())) + 8 for handle in handles]
    columns = len(handles) if sum(lengths) <= LEGEND_CHARACTERS else max(1, min(len(handles), LEGEND_CHARACTERS // max(lengths)))
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=columns, title=scene.series_name, title_fontsize=7.5)
    legend.set_alignment("left")
    return -(-len(handles) // columns)


def draw_colorbar(figure: Figure, axes: list[Axes], scene: Scene) -> None:
    """The colours of a heat map as far as cells use the map."""
    colors = LinearSegmentedColormap.from_list("shown", colormaps[HEATMAP](np.linspace(*SHADES, 256)))
    bar = figure.colorbar(ScalarMappable(scene.norm, colors), ax=axes, label=scene.value_name, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    scale_ticks(bar.ax, scene.log, *scene.norm_span())


def notes(marks: pd.DataFrame, scene: Scene) -> list[str]:
    """Lines under the figure: what the bars are, which cells failed, which values a log axis cannot show."""
    if scene.kind == "heatmap":
        return []  # its cells say so themselves
    lines = ["Error bars: 95 % confidence interval (±1.96 standard errors)."] if marks.stderr.gt(0).any() else []
    if scene.kind == "bars" and scene.log:
        lines = [f"Bars stand on {FULL_PRECISION if scene.baseline else 'the edge of the axis'}. {' '.join(lines)}".strip()]
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


def caption(records: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """One sentence or more that says what the figure shows, for the report."""
    marks, figure = points(records, spec), spec["figure"]
    name, dataset, x, series, _ = layout(tidy(records), figure, "figure")
    label, better = metric_label(name, dataset), metric(name).better
    by = " and ".join(filter(None, (", ".join([x, *series][:-1]), [x, *series][-1])))
    parts = [f"{label[0].upper()}{label[1:]} by {by}" + (f"; {better} is better." if better else ".")]
    if marks.stderr.gt(0).any() and figure["kind"] != "heatmap":
        parts.append("Error bars are 95 % confidence intervals (±1.96 standard errors).")
    if drawable(marks.value[marks.baseline], figure.get("scale") == "log").any() and figure["kind"] != "heatmap":
        parts.append(f"The dashed line is {FULL_PRECISION}.")
    if (marks.status != "ok").any():
        parts.append(f"{(marks.status != 'ok').sum()} failed, marked ×.")
    return " ".join(parts)


def save(figure: Figure, paths: list[str | Path]) -> None:
    """Write the figure to each path (.png at 200 dpi, .pdf, .svg), the same bytes for the same figure, without dates."""
    for path in map(Path, paths):
        if path.suffix not in METADATA:
            raise ConfigError(f"{path}: a figure is written as {', '.join(METADATA)}")
        with matplotlib.rc_context(SETTINGS), replacing(path) as temporary:
            figure.savefig(temporary, metadata=METADATA[path.suffix])


def write_data(records: pd.DataFrame, spec: Mapping[str, Any], path: str | Path) -> None:
    """Write the figure's marks (see :func:`points`) as CSV."""
    with replacing(path) as temporary:
        points(records, spec).to_csv(temporary, index=False, lineterminator="\n")
