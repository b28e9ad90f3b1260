"""Number lines against the quantizer, the Pareto front, and recommendations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from in_process import run_script
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.integrity import write_record
from quantgrid.quantizer import fake_quantize
from quantgrid.reporting.claims.recommendation import recommend, text
from quantgrid.reporting.data.records import AXES
from quantgrid.reporting.figures import number_lines, pareto, study_figures
from quantgrid.schemes import scheme

WINDOWS = np.random.default_rng(0).normal(3.0, 0.4, 32)
CELLS = {  # transform, mitigation, granularity, format, bits, loss above full precision
    "b": ("none", "none", "-", "bf16", 16.0, 0.0),
    "1": ("none", "rtn", "channel", "int4", 4.02, 0.5),
    "2": ("turn", "gptq", "channel", "int4", 4.02, 0.2),
    "3": ("turn", "gptq", "group-64", "int4", 4.25, 0.1),
    "4": ("turn", "rtn", "group-64", "int4", 4.25, 0.1002),
    "5": ("none", "gptq", "group-16", "nvfp4", 4.5, 0.15),
    "6": ("none", "gptq", "group-16", "int8", 9.0, 0.01),
}


def results(model: str = "m") -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, items = [], []
    for number, (cell, (*axes, bits, above)) in enumerate(CELLS.items()):
        noise = np.random.default_rng(number).normal(0, 0.01, 32)
        losses = WINDOWS + above + noise - noise.mean()
        common = {"cell": cell, **dict(zip(AXES, (model, *axes))), "status": "ok", "reason": "", "protocol": ""}
        value = float(np.exp(losses.mean()))
        rows += [
            {
                **common,
                "metric": "perplexity",
                "dataset": "docs",
                "value": value,
                "stderr": value * losses.std(ddof=1) / 32**0.5,
            },
            {**common, "metric": "stored_bits_per_weight", "dataset": "", "value": bits, "stderr": np.nan},
        ]
        items += [
            {"cell": cell, "metric": "negative_log_likelihood", "dataset": "docs", "item": at, "value": loss}
            for at, loss in enumerate(losses)
        ]
    return pd.DataFrame(rows), pd.DataFrame(items)


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


def test_the_front_is_what_no_cell_beats_in_both():
    marks = pareto.points(results()[0]).set_index("cell")
    assert set(marks.index[marks.front]) == {"2", "3", "6"} and marks.baseline.to_dict()["b"]
    both = marks[~marks.baseline]
    for cell, row in both.iterrows():
        beaten = ((both.bits <= row.bits) & (both.perplexity < row.perplexity)).any()
        assert row.front == (not beaten), cell


def test_the_front_of_three_costs_keeps_what_is_cheap_to_run():
    records = results()[0]
    online = pd.DataFrame(
        [
            {
                **row,
                "metric": "online_operations_per_token",
                "dataset": "",
                "value": 500.0 * (row["transform"] == "turn"),
            }
            for row in records.drop_duplicates("cell").to_dict("records")
        ]
    )
    marks = pareto.points(pd.concat([records, online])).set_index("cell")
    assert set(marks.index[marks.front]) == {"2", "3", "6"}
    # 1 and 5 are beaten by turned ones alone
    assert set(marks.index[marks.frugal]) == {"1", "2", "3", "5", "6"}
    assert marks.operations["2"] == 500 and marks.operations["1"] == 0


def test_models_of_the_front_stand_in_their_order_and_every_name_is_below_its_panel():
    both = pd.concat(
        [results(name)[0].assign(cell=lambda frame, name=name: name + frame.cell) for name in ("small-9m", "big-12m")]
    )
    figure = pareto.plot(pareto.points(both))
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")] == [
        "small-9m, docs",
        "big-12m, docs",
    ]
    texts = [text for ax in figure.axes[:4] for text in [*ax.texts, *ax.get_xticklabels()]]
    assert not any("$" in text.get_text() for text in texts), "mathematics that is shown as it is written"
    panel, below = figure.axes[0], figure.axes[2]
    assert (
        "turn + GPTQ, INT4 group-64" in below.texts[0].get_text() and below.get_position().y1 < panel.get_position().y0
    )


def test_figures_are_drawn_the_same_each_time(tmp_path):
    for name, draw in (("p", lambda: pareto.plot(pareto.points(results()[0]))), ("n", number_lines.plot)):
        for again in (1, 2):
            study_figures.save(draw(), [tmp_path / f"{name}{again}.svg"])
        assert (tmp_path / f"{name}1.svg").read_bytes() == (tmp_path / f"{name}2.svg").read_bytes()
    assert "turn + GPTQ, INT4 group-64" in (tmp_path / "p1.svg").read_text()
    study_figures.save(pareto.plot(pareto.points(results()[0].iloc[:0])), [tmp_path / "empty.svg"])


def test_recommendations_are_in_order_and_within_the_bits():
    found = recommend(*results(), "m", 4.3)
    assert (
        list(found.cell) == sorted(["1", "2", "3", "4"], key=lambda cell: CELLS[cell][5]) and (found.bits <= 4.3).all()
    )
    # 3 and 4 differ by less than their noise
    assert list(found.indistinguishable) == [True, True, False, False]
    assert found.relative[0] == pytest.approx(np.exp(0.1), rel=0.01)
    assert (found.low <= found.difference).all() and (found.difference <= found.high).all()
    # paired
    assert found.difference[2] == pytest.approx(0.1, abs=0.01) and found.high[2] - found.low[2] < 0.02
    shown = text(found, "title", 3)
    assert (
        shown.count("*") == 3
        and "turn + GPTQ, INT4 group-64" in shown
        and "Holm over 3" in shown
        and "none + RTN" not in shown
    )


def test_the_cheapest_of_what_is_not_told_apart_is_named():
    records, items = results()
    online = pd.DataFrame(
        [
            {
                **row,
                "metric": "online_operations_per_token",
                "dataset": "",
                "value": 500.0 * (row["mitigation"] == "gptq"),
            }
            for row in records.drop_duplicates("cell").to_dict("records")
        ]
    )
    found = recommend(pd.concat([records, online]), items, "m", 4.3)
    assert list(found.operations[:2]) == [500, 0] or list(found.operations[:2]) == [0, 500]
    assert "Of the 2 with an asterisk the cheapest to run is" in text(found, "title", 9)
    assert (
        text(found, "title", 9)
        .splitlines()[-1]
        .endswith("turn + RTN, INT4 group-64: 0 online operations per token, 4.250 bits.")
    )
    alone = recommend(records[records.cell.isin(["b", "2"])], items, "m", 4.3)
    assert text(alone, "title", 9).endswith("turn + GPTQ, INT4 channel is better than all others.")


@pytest.mark.parametrize(
    ("model", "bits", "corpus", "message"),
    [
        ("n", 5, "", "MODEL: unknown model 'n'"),
        ("m", 3.5, "", "BITS: no cell of 'm' has at most 3.5 stored bits per weight; the smallest has 4.02"),
        ("m", 5, "wiki", "CORPUS: .* measured on docs"),
    ],
)
def test_what_cannot_be_answered_is_said(model, bits, corpus, message):
    with pytest.raises(ConfigError, match=message):
        recommend(*results(), model, bits, corpus)


def test_the_command_answers_from_a_results_folder(tmp_path):
    records, items = results()
    (tmp_path / "studies").mkdir()
    names = [
        "cell",
        *AXES,
        "status",
        "reason",
        "metric",
        "dataset",
        "value",
        "stderr",
        "count",
        "difference",
        "difference_stderr",
        "protocol",
    ]
    records.reindex(columns=names).to_csv(tmp_path / "results.csv", index=False)
    items.to_parquet(tmp_path / "studies" / "s.items.parquet")
    write_record("collect_results", [tmp_path / "results.csv"])
    write_record("collect_study", [tmp_path / "studies" / "s.items.parquet"])
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"results_dir": str(tmp_path)}))
    words = ("--configfile", config, "--model", "m")
    done = run_script("recommend", *words, "--bits", "4.6")
    assert (
        done.returncode == 0 and "5 recipes" in done.stdout and done.stdout.splitlines()[2].startswith(("1*", "1 "))
    ), done.stderr
    done = run_script("recommend", *words, "--bits", "3")
    assert done.returncode == 1 and done.stderr.startswith("recommend: BITS")
    (tmp_path / "results.csv").write_text((tmp_path / "results.csv").read_text().replace("4.", "3.", 1))
    done = run_script("recommend", *words, "--bits", "4.6")
    assert (
        done.returncode == 1 and "results.csv: its content has changed: not what collect_results wrote" in done.stderr
    )
