"""Figures: every kind is drawn, holds its data, hides nothing, overlaps nothing, and is the same
bytes twice."""

import base64
import io
import math
import re
from itertools import combinations, product

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.figures import embedded, residual_error, study_figures
from quantgrid.reporting.figures.labels import value_texts
from quantgrid.reporting.figures.panels import BASELINE as BASELINE_ID
from selection import others_slow

BASELINE = {"transform": "none", "mitigation": "none", "granularity": "-", "format": "bf16"}
KINDS = ("dots", "bars", "lines", "heatmap")
LONG = "a_very_long_name_$x_{y}$_<script>alert(1)</script>_of_a_config_entry"


def record(cell, value=None, metric="perplexity", reason="", stderr=0.1, **axes):
    names = {
        "model": "m",
        "transform": "none",
        "mitigation": "rtn",
        "granularity": "group-32",
        "format": "int4",
        **axes,
    }
    numbers = {
        "value": value,
        "stderr": stderr,
        "count": 32,
        "difference": None,
        "difference_stderr": None,
        "best_difference": None,
        "best_difference_stderr": None,
        "unit": "",
    }
    place = {"metric": "" if reason else metric, "dataset": "" if reason else "text"}
    return {"cell": cell, **names, "status": "failed" if reason else "ok", "reason": reason, **place, **numbers}


def study(
    models=("m",),
    transforms=("none", "shift", "rotate"),
    mitigations=("rtn", "gptq"),
    fail=(("shift", "gptq"),),
    **axes,
):
    rows = []
    for model in models:
        rows.append(record(f"{model}-b", 8.0, model=model, **BASELINE))
        for number, (transform, mitigation) in enumerate((t, m) for t in transforms for m in mitigations):
            names = {"model": model, "transform": transform, "mitigation": mitigation, **axes}
            reason = {"reason": "NaN"} if (transform, mitigation) in fail else {}
            rows.append(record(f"{model}-{number}", None if reason else 9.0 + 3.0 * number, **reason, **names))
    return pd.DataFrame(rows)


def spec(kind="dots", **figure):
    return {
        "study": "s",
        "figure": {
            "kind": kind,
            "x": "mitigation",
            "hue": "transform",
            "metric": "perplexity",
            "scale": "log",
            **figure,
        },
    }


def texts_of(figure):
    """All texts that are drawn: matplotlib keeps labels of ticks beyond the limits, too."""
    figure.draw_without_rendering()
    ticks = [(tick, ax.get_ylim()) for ax in figure.axes for tick in ax.yaxis.get_major_ticks()]
    beyond = {id(tick.label1) for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and id(text) not in beyond]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_every_kind_names_the_failed_cell_and_the_baseline(kind, scale):
    figure = study_figures.plot(study(), spec(kind, scale=scale))
    words = " | ".join(text.get_text() for text in texts_of(figure))
    assert "failed" in words and "8.000" in words and "(lower is better)" in words
    if kind != "heatmap":
        assert "× failed: shift + GPTQ" in words and "95 % confidence" in words and "full precision" in words
    assert figure.get_size_inches()[0] == 7.0


@pytest.mark.parametrize("kind", others_slow(KINDS, lambda kind: kind in ("dots", "heatmap")))
def test_same_bytes_twice_without_dates(kind, tmp_path):
    for name in ("one", "two"):
        study_figures.save(
            study_figures.plot(study(), spec(kind)),
            [tmp_path / f"{name}{suffix}" for suffix in (".png", ".pdf", ".svg")],
        )
    for suffix in (".png", ".pdf", ".svg"):
        first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
        assert first == second and b"CreationDate" not in first and b"dc:date" not in first
    svg = (tmp_path / "one.svg").read_text()
    assert "<text" in svg and ">GPTQ</text>" in svg


def test_names_from_the_config_are_text_not_markup_or_mathematics(tmp_path):
    study_figures.save(
        study_figures.plot(study(transforms=("none", LONG), models=(LONG, "m")), spec()), [tmp_path / "f.svg"]
    )
    svg = (tmp_path / "f.svg").read_text()
    assert ("<script" not in svg and "&lt;script" in svg) or "…" in svg


@pytest.mark.parametrize("kind", ["dots", "bars", "lines"])
def test_no_text_overlaps_another(kind):
    transforms = tuple(f"{LONG}{number}" for number in range(7))
    mitigations = tuple(f"a_mitigation_with_words_in_its_name_{number}" for number in range(5))
    fail = [(transform, mitigations[1]) for transform in transforms]
    for frame in (
        study(),
        study(models=("m", "n", "o")),
        study(transforms=transforms, mitigations=mitigations, fail=fail),
    ):
        figure = study_figures.plot(frame, spec(kind))
        boxes = [
            (text.get_text(), text.get_window_extent()) for text in texts_of(figure) if text.get_rotation() in (0, 90)
        ]
        inside = figure.bbox.padded(1)
        clashes = [
            (a, b) for (a, first), (b, second) in combinations(boxes, 2) if first.padded(-1).overlaps(second.padded(-1))
        ]
        assert not clashes
        assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for _, box in boxes)


def test_many_names_below_an_axis_stand_upright_and_clear_of_each_other():
    names = tuple(f"a-transform-{number}" for number in range(40))
    figure = study_figures.plot(study(transforms=names, fail=()), spec(x="transform", hue="mitigation"))
    names = [text for text in figure.axes[0].get_xticklabels() if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert len(names) >= 40 and {text.get_rotation() for text in names} == {90}
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


def test_value_labels_stay_where_they_fit_and_go_where_they_do_not():
    assert len(value_texts(study_figures.plot(study(fail=()), spec("bars", scale="linear")).axes[0])) == 6
    crowded = study(
        transforms=tuple(f"t{number}" for number in range(12)), mitigations=tuple(f"m{number}" for number in range(12))
    )
    assert not value_texts(study_figures.plot(crowded, spec("bars", scale="linear")).axes[0])


def test_points_are_the_marks_with_their_intervals(tmp_path):
    frame = study()
    marks = study_figures.points(frame, spec())
    assert len(marks) == 7 and marks.baseline.sum() == 1
    first = marks[(marks.series == "no transform") & (marks.x == "RTN")].iloc[0]
    assert first.value == 9.0 and math.isclose(first.low, 9.0 - 0.196) and math.isclose(first.high, 9.0 + 0.196)
    assert marks[marks.status == "failed"][["series", "x", "reason"]].values.tolist() == [["shift", "GPTQ", "NaN"]]
    study_figures.write_data(frame, spec(), tmp_path / "d.csv")
    assert pd.read_csv(tmp_path / "d.csv").value.dropna().tolist() == marks.value.dropna().tolist()


@pytest.mark.parametrize("facet", ["mitigation", "granularity", "transform"])
def test_the_baseline_stands_in_every_panel_and_has_none_of_its_own(facet):
    frame = pd.concat(
        [
            study(fail=()),
            study(fail=(), granularity="group-64").query("mitigation != 'none'").assign(cell=lambda f: f.cell + "-64"),
        ]
    )
    x, hue = [axis for axis in ("transform", "mitigation", "granularity") if axis != facet]
    marks = study_figures.points(frame, spec("lines", x=x, hue=hue, facet=facet))
    panels = set(marks[~marks.baseline].panel)
    assert set(marks.panel) == panels == set(marks[marks.baseline].panel) and marks.baseline.sum() == len(panels) > 1
    assert len(marks[~marks.baseline]) == 12


def test_x_follows_the_records_even_if_the_first_series_lacks_a_value():
    frame = study(fail=())
    frame = frame[~((frame.transform == "none") & (frame.mitigation == "rtn"))]
    frame = pd.concat([frame[frame.mitigation != "gptq"], frame[frame.mitigation == "gptq"]])
    labels = [text.get_text() for text in study_figures.plot(frame, spec()).axes[0].get_xticklabels()]
    assert labels == ["RTN", "GPTQ"]


def test_models_get_panels_and_other_axes_join_the_series():
    both = pd.concat(
        [
            study(fail=()),
            study(fail=(), format="nvfp4").query("format == 'nvfp4'").assign(cell=lambda frame: frame.cell + "x"),
        ]
    )
    assert set(study_figures.points(both, spec()).query("not baseline").series) >= {
        "shift, W4A4 INT4",
        "shift, W4A4 NVFP4",
    }
    figure = study_figures.plot(study(models=("one", "two", "three", "four")), spec())
    assert [ax.get_title(loc="left") for ax in figure.axes[:4]] == ["one", "two", "three", "four"]


def test_with_a_facet_each_model_has_a_row_with_limits_and_a_baseline_of_its_own():
    """Perplexities of a large and a small model lie apart: common limits would leave neither
    readable."""
    small, large = (study(models=(name,), fail=()) for name in ("small", "large"))
    large["value"] *= 40
    other = (
        pd.concat([small, large])
        .query("mitigation != 'none'")
        .assign(cell=lambda frame: frame.cell + "x", format="nvfp4")
    )
    frame = pd.concat([small, large, other])
    figure = study_figures.plot(frame, spec(facet="format"))
    rows = [figure.axes[:2], figure.axes[2:]]
    assert [[ax.get_title(loc="left") for ax in row] for row in rows] == [
        ["small, W4A4 INT4", "W4A4 NVFP4"],
        ["large, W4A4 INT4", "W4A4 NVFP4"],
    ]
    assert (
        all(len({ax.get_ylim() for ax in row}) == 1 for row in rows) and rows[0][0].get_ylim() != rows[1][0].get_ylim()
    )
    lines = [[line.get_ydata()[0] for ax in row for line in ax.lines if line.get_gid() == BASELINE_ID] for row in rows]
    assert lines == [[8.0, 8.0], [320.0, 320.0]]
    assert set(study_figures.points(frame, spec(facet="format")).query("not baseline").series) == {
        "no transform",
        "shift",
        "rotate",
    }


def test_a_panel_shows_the_names_of_its_facet_alone():
    frame = pd.concat(
        [
            study(transforms=("none", "shift"), fail=()),
            study(transforms=("rotate",), fail=(), format="nvfp4")
            .query("format == 'nvfp4'")
            .assign(cell=lambda frame: frame.cell + "x"),
        ]
    )
    figure = study_figures.plot(frame, spec(x="transform", hue="mitigation", facet="format"))
    assert [[text.get_text() for text in ax.get_xticklabels()] for ax in figure.axes] == [
        ["no transform", "shift"],
        ["rotate"],
    ]


def test_lists_of_the_study_give_the_order_even_where_cells_are_excluded():
    present = (("rtn", ("int2", "int8")), ("gptq", ("int2", "int3", "int8")))
    frame = pd.DataFrame(
        [
            record(f"{mitigation}{name}", 9.0, mitigation=mitigation, format=name)
            for mitigation, names in present
            for name in names
        ]
    )
    wanted = {**spec("lines", x="format", hue="mitigation"), "formats": ["int2", "int3", "int8"]}
    assert [text.get_text() for text in study_figures.plot(frame, wanted).axes[0].get_xticklabels()] == [
        "W2A2 INT2",
        "W3A3 INT3",
        "W8A8 INT8",
    ]


@pytest.mark.parametrize("kind", ["dots", "bars", "lines"])
def test_of_what_compares_with_full_precision_its_own_value_is_named_not_drawn(kind):
    frame = study(fail=()).assign(metric="kl_divergence")
    figure = study_figures.plot(frame, spec(kind, metric="kl_divergence"))
    words = " | ".join(text.get_text() for text in texts_of(figure))
    assert "Full precision, measured like a cell: 8.00; not drawn." in words
    assert "dashed" not in study_figures.caption(frame, spec(kind, metric="kl_divergence"))
    assert (
        not [line for line in figure.axes[0].lines if line.get_gid() == BASELINE_ID]
        and figure.axes[0].get_ylim()[0] > 8
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_cell_only_failures_and_only_a_baseline(kind):
    for frame in (
        pd.DataFrame([record("1", 9.0, stderr=None)]),
        pd.DataFrame([record("1", reason="NaN")]),
        pd.DataFrame([record("b", 8.0, **BASELINE)]),
        study(transforms=("none",), mitigations=("rtn",), fail=()),
    ):
        study_figures.plot(frame, spec(kind)).draw_without_rendering()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("metric", "facet"),
    others_slow(
        product(["perplexity", "kl_divergence"], [None, "format"]),
        lambda metric, facet: (metric == "perplexity") == (facet is None),
    ),
)
def test_a_panel_with_a_baseline_alone_is_left_out_and_named(kind, metric, facet):
    """In the report of a run that goes on, or of which a model failed before its cells began."""
    failed, done = record("x", model="broken", reason="NaN", **BASELINE), record("y", 7.0, model="waits", **BASELINE)
    frame = pd.concat([study(fail=()), pd.DataFrame([failed, done])], ignore_index=True)
    frame.loc[frame.status == "ok", "metric"] = metric
    figure = study_figures.plot(frame, spec(kind, metric=metric, **({"facet": facet} if facet else {})))
    words = " | ".join(text.get_text() for text in texts_of(figure))
    assert "× failed at full precision: broken; not drawn." in words
    assert re.search(r"Full precision, measured like a cell: .*7\.00( \(waits\))?; not drawn\.", words)
    assert len([ax for ax in figure.axes if ax.get_label() != "<colorbar>" and ax.axison]) == 1
    study_figures.caption(frame, spec(kind, metric=metric))


def test_a_metric_that_no_cell_has_is_an_error_with_its_name():
    """A study of which only the errors of quantization are there yet, in the report after a run
    that failed."""
    with pytest.raises(ConfigError, match="no cell has the metric 'perplexity'"):
        study_figures.plot(pd.DataFrame([record("1", 40.0, "weight_sqnr_db")]), spec())


def test_an_error_of_zero_draws_no_line_to_the_bottom():
    """The first layer passes nothing on, which a logarithmic axis cannot show."""
    cell = {**BASELINE, "model": "m", "corpus": "text", "start_kept": False}
    rows = [{**cell, "layer": 1, "error": 0.1, "added": 0.1, "passed_on": 0.0}]
    rows += [{**cell, "layer": at, "error": 0.2, "added": 0.1, "passed_on": 0.15} for at in (2, 3)]
    ax = residual_error.plot(pd.DataFrame(rows)).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    passed_on = drawn["passed on from the layers before"]
    assert np.isnan(passed_on[0]) and list(passed_on[1:]) == [0.15, 0.15]
    assert all(np.isfinite(drawn[label]).all() for label in ("all of it", "added by the layer"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_a_log_axis_cannot_show_is_named(kind):
    rows = [record("1", 0.0, "kl_divergence", transform="rotate"), record("2", 0.5, "kl_divergence", transform="shift")]
    figure = study_figures.plot(pd.DataFrame(rows), spec(kind, metric="kl_divergence"))
    if kind != "heatmap":
        assert any("Not above 0" in text.get_text() and "rotate" in text.get_text() for text in texts_of(figure))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (spec("pie"), "figure.unknown kind 'pie'.*bars"),
        (spec(scale="ln"), "unknown scale 'ln'"),
        (spec(x="mitigations"), "did you mean 'mitigation'"),
        (spec(hue="mitigation"), "named twice"),
        (spec(metric=None), "needs 'x'"),
        (spec(dataset="other"), "measured on none of other"),
    ],
)
def test_a_wrong_spec_names_its_key(wrong, message):
    with pytest.raises(ConfigError, match=message):
        study_figures.plot(study(), wrong)


def test_two_cells_in_one_place_and_several_datasets_are_refused():
    with pytest.raises(ConfigError, match="one place"):
        study_figures.plot(pd.DataFrame([record("1", 1.0), record("2", 2.0)]), spec())
    both = pd.DataFrame([record("1", 1.0), {**record("1", 1.0), "dataset": "other"}])
    with pytest.raises(ConfigError, match="name one of text, other"):
        study_figures.plot(both, spec())


def test_a_caption_says_what_the_bars_are():
    text = study_figures.caption(study(), spec())
    assert (
        text.startswith("Perplexity, text by mitigation and transform; lower is better.")
        and "1 failed" in text
        and "±1.96" in text
    )


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.png, \.pdf, \.svg"):
        study_figures.save(study_figures.plot(study(), spec()), [tmp_path / "f.jpg"])


def test_pictures_in_an_svg_are_smaller_and_the_same_pixels(tmp_path):
    figure = Figure()
    figure.subplots().imshow(
        np.random.default_rng(0).normal(size=(30, 192)),
        matplotlib.colormaps["viridis"].resampled(64),
        interpolation="none",
    )
    figure.savefig(tmp_path / "plain.svg")
    plain = (tmp_path / "plain.svg").read_text()
    first, second = (picture(text) for text in (plain, embedded.lean(plain)))
    assert second.mode == "P" and np.array_equal(np.array(first.convert("RGB")), np.array(second.convert("RGB")))
    assert len(embedded.lean(plain)) < 0.7 * len(plain)
    figure.axes[0].images[0].set_data(
        np.random.default_rng(0).random((30, 192, 3))
    )  # more colours than a palette holds
    figure.savefig(tmp_path / "many.svg")
    assert embedded.lean((tmp_path / "many.svg").read_text()) == (tmp_path / "many.svg").read_text()


def picture(svg):
    return Image.open(io.BytesIO(base64.b64decode(embedded.EMBEDDED.search(svg)[2])))
