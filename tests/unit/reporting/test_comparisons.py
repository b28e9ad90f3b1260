"""Paired comparisons of a study's cells: effects and p-values against scipy and by hand, what is
left out, and how they are shown."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_tables import BASELINE, record

from in_process import run_script
from quantgrid.config import check
from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.data.paired import estimate, holm
from quantgrid.reporting.tables import comparisons, writers

WINDOWS, LOSS = 16, "negative_log_likelihood"
SPREAD = np.random.default_rng(0).normal(2.0, 0.5, WINDOWS)  # of windows, shared by all cells
NOISE = {name: np.random.default_rng(number).normal(0, 0.01, WINDOWS) for number, name in enumerate("abcd", 1)}
LOSSES = {
    "1": SPREAD,
    "2": SPREAD - 0.1 + NOISE["a"],
    "3": SPREAD + NOISE["b"] - NOISE["b"].mean(),
    "4": SPREAD + 1,
    "5": SPREAD + 1.3 + NOISE["c"],
}
CELLS = {
    "1": ("none", "gptq"),
    "2": ("none", "caldera"),
    "3": ("none", "lr"),
    "4": ("rotate", "gptq"),
    "5": ("rotate", "caldera"),
}


def study() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two transforms; ``caldera`` is better without, worse with the second; ``lr`` is as good; one
    cell failed, one has no counterpart."""
    cells = [record("0", 2.0, metric=LOSS, **BASELINE)]
    cells += [
        record(key, LOSSES[key].mean(), metric=LOSS, transform=names[0], mitigation=names[1])
        for key, names in CELLS.items()
    ]
    cells += [
        record("6", transform="rotate", mitigation="lr", reason="NaN"),
        record("7", 2.0, metric=LOSS, transform="alone", mitigation="lr"),
    ]
    values = {**LOSSES, "0": SPREAD, "7": SPREAD}
    items = [(cell, LOSS, "text", item, loss) for cell, losses in values.items() for item, loss in enumerate(losses)]
    return pd.DataFrame(cells), pd.DataFrame(items, columns=["cell", "metric", "dataset", "item", "value"]).sample(
        frac=1, random_state=0
    )


def spec(**compare):
    return {
        "study": "a_study",
        "title": "A",
        "table": {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity"]},
        "compare": {"axis": "mitigation", "to": "gptq", "metrics": [LOSS], **compare},
    }


def test_every_cell_is_compared_with_its_counterpart_over_the_same_windows():
    found = comparisons.evaluate(*study(), spec()).set_index(["transform", "mitigation"])
    assert set(found.index) == {("none", "caldera"), ("none", "lr"), ("rotate", "caldera")}
    for cell, other, at in (("2", "1", ("none", "caldera")), ("5", "4", ("rotate", "caldera"))):
        row, (_, p) = found.loc[at], stats.ttest_rel(LOSSES[cell], LOSSES[other])
        assert row.effect == pytest.approx(np.mean(LOSSES[cell] - LOSSES[other])) and row.p == pytest.approx(p)
        assert row.low < row.effect < row.high and row["count"] == WINDOWS
        assert row.stderr == pytest.approx(stats.sem(LOSSES[cell] - LOSSES[other]))
    assert found.differs.to_dict() == {("none", "caldera"): True, ("none", "lr"): False, ("rotate", "caldera"): True}
    assert found.p_adjusted.tolist() == holm(found.p.tolist()) and (found.p_adjusted >= found.p).all()


def test_the_table_has_a_column_per_compared_value_and_marks_what_differs():
    compared = comparisons.evaluate(*study(), spec())
    table = comparisons.table(compared, spec())
    assert table.row_labels() == [["no transform"], ["rotate"]] and table.column_labels() == ["caldera", "lr"]
    assert table.marks.values.tolist() == [["best", "tied"], ["best", "missing"]] and table.display.iloc[1, 1] == "–"
    assert table.values.iloc[0, 0] == pytest.approx(-0.1, abs=0.01) and table.groups()[0][0].endswith(
        ", less that of GPTQ ↓"
    )
    shown = writers.markdown(table)
    assert comparisons.NOTE in shown and "**A: differences to GPTQ**" in shown and "| no transform | **-0.098" in shown


def test_comparisons_come_back_from_their_file(tmp_path):
    compared = comparisons.evaluate(*study(), spec())
    compared.to_csv(tmp_path / "compared.csv", index=False)
    pd.testing.assert_frame_equal(comparisons.read(tmp_path / "compared.csv"), compared, check_dtype=False)


def test_where_all_counterparts_failed_the_job_succeeds_and_says_so(tmp_path):
    records, items = study()
    records.loc[records.mitigation == "gptq", "status"] = "failed"
    records.to_csv(tmp_path / "records.csv", index=False)
    items.to_parquet(tmp_path / "items.parquet")
    paths = [
        option
        for name, file in (
            ("records", "records.csv"),
            ("samples", "items.parquet"),
            ("csv", "c.csv"),
            ("md", "c.md"),
            ("tex", "c.tex"),
        )
        for option in (f"--{name}", str(tmp_path / file))
    ]
    assert run_script("compare_study", "--spec", json.dumps(spec()), *paths).returncode == 0
    assert comparisons.read(tmp_path / "c.csv").empty and (tmp_path / "c.md").read_text() == comparisons.NOTHING


def test_intervals_cover_the_mean_as_often_as_they_say():
    random = np.random.default_rng(5)
    covered = [low <= 0.3 <= high for _, low, high, _ in (estimate([random.normal(0.3, 1, 40)]) for _ in range(60))]
    assert 0.86 <= np.mean(covered) <= 0.99


def test_without_spread_the_number_itself_decides_and_one_window_decides_nothing():
    assert estimate([np.full(5, 0.25)]) == (0.25, 0.25, 0.25, 0.0) and estimate([np.zeros(5)])[3] == 1.0
    assert (
        estimate([np.array([2.0])]) == estimate([np.array([2.0]), np.array([0.0, 0.0])]) == (2.0, -np.inf, np.inf, 1.0)
    )


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def config(**compare) -> dict:
    return {
        "models": {
            "m": {
                "source": "hub",
                "id": "a/b",
                "revision": "main",
                "shape": {
                    "architecture": "LlamaForCausalLM",
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "layers": 1,
                    "heads": 2,
                    "kv_heads": 2,
                    "head_dim": 32,
                    "vocabulary": 100,
                },
            }
        },
        "corpora": {
            name: {"source": "builtin", "part": name, "window": 64, "windows": 4}
            for name in ("calibration", "evaluation")
        },
        "calibrations": {"default": {"corpus": "calibration"}},
        "evaluate": {"perplexity": ["evaluation"]},
        "studies": {
            "s": {
                "models": ["m"],
                "transforms": ["none"],
                "mitigations": ["rtn", "gptq"],
                "granularities": ["channel"],
                "formats": ["int4"],
                "compare": {"axis": "mitigation", "to": "rtn", **compare},
            }
        },
    }


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"to": "gptqq"}, "studies.s.compare.to: unknown mitigation 'gptqq'"),
        (
            {"axis": "format", "to": "int4"},
            "studies.s.compare: no cell differs from one with format 'int4' in that axis alone",
        ),
        (
            {"metrics": ["accuracy"]},
            "studies.s.compare: metric 'accuracy' is not measured in this study; name a task in evaluate.tasks",
        ),
        ({"metrics": ["perplexity"]}, "studies.s.compare.metrics.0: 'perplexity' is not accepted"),
    ],
)
def test_a_config_that_compares_nothing_is_refused(compare, message):
    with pytest.raises(ConfigError, match="^" + message.replace(".", r"\.")):
        check(config(**compare))


def test_losses_are_compared_where_the_config_does_not_say():
    assert check(config())["studies"]["s"]["compare"]["metrics"] == [LOSS]
