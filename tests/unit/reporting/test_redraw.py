"""Figures from `results.csv` alone: the records of a study are found again among those of all, and
what is missing is said."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import yaml

from checkouts import ROOT
from in_process import Done, run_script
from plan_cases import content
from quantgrid.config import check, grid
from quantgrid.config.cells import AXES
from quantgrid.evaluation.protocols import of_mean
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.provenance import canonical
from quantgrid.reporting.data.collection import cell_key, merge
from quantgrid.reporting.data.selection import of_study

COLUMNS = [
    "cell",
    *AXES.values(),
    "status",
    "reason",
    "metric",
    "dataset",
    "value",
    "stderr",
    "count",
    "difference",
    "difference_stderr",
    "best_difference",
    "best_difference_stderr",
    "unit",
    "protocol",
]


def several() -> dict:
    """Three studies that share cells and ask different things of them: corpora, tasks, one task
    less."""
    config = content()
    fewer = {
        **deepcopy(config["studies"]["formats"]),
        "evaluate": {"perplexity": ["more"], "tasks": ["cloze"]},
        "figure": {"dataset": "more"},
    }
    config["studies"]["fewer"] = fewer
    return check(config)


def records(config: dict, study: str) -> pd.DataFrame:
    """Records of a study as `collect_study` writes them; every number differs."""
    asked, rows = grid.asked(config, config["studies"][study]), []
    named = {task: {"name": task} for task in asked["tasks"]}
    for cell in grid.study_cells(config, study):
        found = [
            ("weight_sqnr_db", "", ""),
            *((metric, corpus, corpus) for corpus in asked["perplexity"] for metric in ("perplexity", "kl_divergence")),
            *(("accuracy", task, canonical(protocol)) for task, protocol in named.items()),
            *([("mean_accuracy", "", canonical(of_mean(named)))] if len(named) > 1 else []),
            *(("residual_error", corpus, "") for corpus in asked["residual_error"] if cell.quantized),
        ]
        rows += [
            {
                "cell": cell_key(cell),
                **cell.axes,
                "status": "ok",
                "reason": "",
                "metric": metric,
                "dataset": dataset,
                "protocol": protocol,
                "value": str(len(cell.path + metric + dataset + protocol)),
            }
            for metric, dataset, protocol in found
        ]
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object).fillna("")


def test_merged_records_fall_apart_into_those_of_their_studies():
    config = several()
    studies = {study: records(config, study) for study in config["studies"]}
    merged = merge([*studies.values()])
    assert len(merged) < sum(map(len, studies.values())), "cells are shared"
    order = ["cell", "metric", "dataset"]
    for study, expected in studies.items():
        found = of_study(merged, config, study)
        assert list(found.cell.unique()) == list(expected.cell.unique()), "in the order of the study"
        expected = expected[list(found)].sort_values(order).reset_index(drop=True)
        pd.testing.assert_frame_equal(found.sort_values(order).reset_index(drop=True), expected)


def test_a_study_with_cells_that_the_results_lack_is_refused():
    config = several()
    merged = merge([records(config, "formats")])
    with pytest.raises(
        ConfigError,
        match=r"methods: 17 of its 19 cells are not in these results, the first of them tiny/none/lr8/channel/int4",
    ):
        of_study(merged, config, "methods")


def command(tmp_path: Path, *options: str) -> Done:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content()))
    return run_script(
        "redraw_figures", "--configfile", tmp_path / "config.yaml", "--folder", tmp_path / "out", *options, folder=ROOT
    )


def test_the_command_names_what_is_wrong(tmp_path):
    no_file = command(tmp_path, "--results", str(tmp_path / "none.csv"))
    no_study = command(tmp_path, "--results", str(tmp_path / "none.csv"), "--study", "format")
    assert no_file.returncode and f"{tmp_path / 'none.csv'}: there is no such file" in no_file.stderr
    assert no_study.returncode and "did you mean 'formats'" in no_study.stderr.replace("Did", "did")
    assert "Traceback" not in no_file.stderr + no_study.stderr and not (tmp_path / "out").exists()
