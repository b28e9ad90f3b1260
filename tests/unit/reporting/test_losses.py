"""Figure of training losses: a panel per training, every loss in it, the same bytes twice."""

from __future__ import annotations

import pandas as pd
import pytest

from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.figures import losses, study_figures
from quantgrid.reporting.page import report


@pytest.fixture
def files(tmp_path):
    rows = {
        "joint": [["all", step, 1 / step, 0.1] for step in range(1, 6)],
        "layers": [[str(layer), step, 10.0**layer / step, 0.1] for layer in range(3) for step in range(1, 5)],
        "none": [],
    }
    paths = {}
    for name, content in rows.items():
        paths[f"m, {name}"] = tmp_path / f"{name}.csv"
        pd.DataFrame(content, columns=losses.COLUMNS).to_csv(paths[f"m, {name}"], index=False)
    return paths


def test_every_training_is_a_panel_with_all_its_losses(files):
    table = losses.read(list(files.values()), list(files))
    assert len(table) == 5 + 12 and list(table.label.unique()) == ["m, joint", "m, layers"]
    joint, layers, none, empty = losses.plot(table, list(files)).axes
    assert not empty.axison
    assert [ax.get_title(loc="left") for ax in (joint, layers, none)] == ["joint", "layers", "none"]
    assert list(joint.lines[0].get_ydata()) == [1 / step for step in range(1, 6)] and joint.get_yscale() == "linear"
    assert len(layers.lines) == 4 and layers.get_yscale() == "log"
    assert list(layers.lines[-1].get_ydata()) == pytest.approx([111 / 3 / step for step in range(1, 5)])
    assert [text.get_text() for text in none.texts] == ["no steps"]
    figure = losses.plot(table, list(files))
    figure.draw_without_rendering()
    assert not any("$" in tick.get_text() for ax in figure.axes for tick in ax.get_yticklabels())
    several = ["m, joint", "m, layers", "n, none"]
    assert [ax.get_title(loc="left") for ax in losses.plot(table, several).axes] == [*several, ""]


def test_the_same_figure_is_the_same_bytes(files, tmp_path):
    table = losses.read(list(files.values()), list(files))
    for name in ("a", "b"):
        study_figures.save(
            losses.plot(table, list(files)), [tmp_path / f"{name}{suffix}" for suffix in (".png", ".svg", ".pdf")]
        )
    assert all(
        (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
        for suffix in (".png", ".svg", ".pdf")
    )
    page = report.build([], {"losses": str(tmp_path / "a.svg")})
    assert "Training of learned transforms" in page and "Training of learned transforms" not in report.build([], {})


def test_another_table_is_refused_by_name(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"x\.csv: not a table of losses"):
        losses.read([tmp_path / "x.csv"], ["x"])
