"""Number lines against the quantizer, and the Pareto fronts."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from overview_cases import results
from quantgrid.quantizer import fake_quantize
from quantgrid.reporting.figures import number_lines, pareto, placement, study_figures
from quantgrid.schemes import scheme


@pytest.mark.parametrize("largest", number_lines.MAXIMA)
@pytest.mark.parametrize(
    ("name", "preset", "changes"),
    [
        ("INT4", "int4", {"granularity": "channel"}),
        ("FP4", "fp4", {"granularity": "channel"}),
        ("MXFP4", "mxfp4", {}),
        ("NVFP4", "nvfp4", {}),
    ],
)
def test_number_lines_are_what_the_quantizer_makes(name, preset, changes, largest):
    """Every value that the quantizer rounds a fine ramp to, block by block with the largest
    magnitude in each, is on the line."""
    made = scheme(preset, **changes)
    size = made.group_size or 32
    ramp = torch.linspace(-largest, largest, 100 * (size - 1), dtype=torch.float64).reshape(100, size - 1)
    blocks = torch.cat([torch.full((100, 1), largest, dtype=torch.float64), ramp], 1).float()
    whole = torch.cat(
        [blocks, torch.full((1, size), number_lines.TENSOR_MAXIMUM)]
    )  # for NVFP4's global scale; other blocks are by themselves
    found = fake_quantize(whole, made)[:-1].double().unique().numpy()
    line = number_lines.table().query("format == @name and largest == @largest").value.to_numpy()
    distance = np.abs(found[:, None] - line[None, :])
    assert distance.min(1).max() < 1e-6, "a value that is not on the line"
    missed = line[distance.min(0) > 1e-6]
    assert set(missed) <= (
        {line.min()} if name == "INT4" else {value for value in line if abs(value) > np.abs(found).max() + 1e-6}
    )


def test_the_front_is_what_no_cell_of_its_kind_beats_in_both():
    marks = pareto.points(results()[0], {}).set_index("cell")
    assert set(marks.index[marks.front_online]) == {"2", "3", "6", "9"} and marks.baseline.to_dict()["b"]
    assert set(marks.index[marks.front]) == {"1", "4", "6", "7"}
    quantized = marks[~marks.baseline]
    for online, column in ((False, "front"), (True, "front_online")):
        rivals = quantized[~quantized.online | online]
        for cell, row in rivals.iterrows():
            own = rivals[rivals.rounded == row.rounded]
            beaten = ((own.bits <= row.bits) & (own.divergence < row.divergence)).any()
            assert row[column] == (not beaten), cell
    assert marks.operations["2"] == 500 and marks.operations["1"] == 0


def labels(figure):
    return [[text for text in ax.texts if text.get_gid() == placement.LABEL] for ax in figure.axes]


def test_a_panel_per_model_and_kind_has_labels_that_touch_nothing():
    both = pd.concat([results(name, name[0])[0] for name in ("small-9m", "big-12m")])
    figure = pareto.plot(pareto.points(both, {}))
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        f"{model}\n{words}"
        for model in ("small-9m", "big-12m")
        for words in ("weights only", "weights and activations")
    ]
    words = [text.get_text().replace("\n", " ") for panel in labels(figure) for text in panel]
    assert words.count("W4A16 g64 GPTQ") == 2 and words.count("W4A4 INT4 group-64 turn + GPTQ") == 2
    for ax, panel in zip(figure.axes, labels(figure)):
        boxes = [placement.text_box(text) for text in panel]
        assert panel and not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert not any(box.overlaps(dot) for box in boxes for dot in placement.dots(ax))
        assert all(ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 + 1 for box in boxes)
    assert not any("$" in text.get_text() for ax in figure.axes for text in [*ax.texts, *ax.get_xticklabels()])


def test_lines_to_labels_do_not_cross():
    """Of marks side by side, whose lines cross in the order of heights: labels change places."""
    figure = Figure()
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    marks = pd.DataFrame({"x": [0.0, 1.0, 2.0, 3.0], "y": [0.5, 0.5, 0.5, 0.5], "text": list("abcd")})
    ax.plot(marks.x, marks.y, "o")
    ax.set_xlim(-1, 9)
    figure.draw_without_rendering()
    found = placement.label_points(ax, marks, "x", "y", "text")
    figure.draw_without_rendering()
    boxes = {label.get_text(): placement.text_box(label) for label in found}
    middles = {text: (box.y0 + box.y1) / 2 for text, box in boxes.items()}
    marked = {row.text: tuple(ax.transData.transform((row.x, row.y))) for row in marks.itertuples()}
    lines = [(marked[text], (boxes[text].x0, middles[text])) for text in boxes]
    assert sorted(middles, key=middles.get, reverse=True) != list("dcba")
    assert not any(placement.crossing(*pair) for pair in combinations(lines, 2))


@pytest.mark.parametrize("wanted", [[5.0, 5.0, 5.0], [9.5, 9.0, 0.5], [0.0, 0.0], [10.0], []])
def test_boxes_are_spread_out_within_their_limits(wanted):
    heights = [2.0, 1.0, 3.0][: len(wanted)]
    places = placement.spread_out(wanted, heights, (0.0, 10.0))
    edges = [(place + tall / 2, place - tall / 2) for place, tall in zip(places, heights, strict=True)]
    assert all(high <= 10 + 1e-9 and low >= -1e-9 for high, low in edges)
    assert all(above[1] >= below[0] - 1e-9 for above, below in pairwise(edges))


def test_a_long_label_ends_within_its_panel():
    records = results()[0].replace({"transform": {"turn": "A-NAME-OF-CAPITALS-WITHOUT-END-AND-MORE WWWWWWWWWWWWWWWW"}})
    figure = pareto.plot(pareto.points(records, {}))
    for ax, panel in zip(figure.axes, labels(figure)):
        assert panel and all(placement.text_box(text).x1 <= ax.bbox.x1 + 1 for text in panel)


def test_boxes_that_do_not_touch_stay():
    assert placement.spread_out([8.0, 5.0, 2.0], [2.0, 2.0, 2.0], (0.0, 10.0)) == pytest.approx([8.0, 5.0, 2.0])


def test_a_crowded_front_labels_what_fits():
    records = results()[0]
    many = [
        records[records.cell == "3"].assign(
            cell=f"n{number}", transform=f"a-transform-{number}", value=lambda f, n=number: f.value * (1 + 1e-3 * n)
        )
        for number in range(30)
    ]
    figure = pareto.plot(pareto.points(pd.concat([records, *many]), {}))
    boxes = [[placement.text_box(text) for text in panel] for panel in labels(figure)]
    assert all(panel for panel in boxes)
    assert not any(one.overlaps(other) for panel in boxes for one, other in combinations(panel, 2))


def test_figures_are_drawn_the_same_each_time(tmp_path):
    for name, draw in (("p", lambda: pareto.plot(pareto.points(results()[0], {}))), ("n", number_lines.plot)):
        for again in (1, 2):
            study_figures.save(draw(), [tmp_path / f"{name}{again}.svg"])
        assert (tmp_path / f"{name}1.svg").read_bytes() == (tmp_path / f"{name}2.svg").read_bytes()
    assert "turn + GPTQ" in (tmp_path / "p1.svg").read_text()
    study_figures.save(pareto.plot(pareto.points(results()[0].iloc[:0], {})), [tmp_path / "empty.svg"])
