"""docs/reference/data.md names every column of the data files in their order, and every metric with
its unit and better direction."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import yaml

import collect_results
import list_steps
from checkouts import ROOT
from quantgrid.reporting.claims import verdicts
from quantgrid.reporting.data import collection
from quantgrid.reporting.data.evaluation_rows import UNITS
from quantgrid.reporting.figures import allocations, pareto, residual_error
from quantgrid.reporting.style import METRICS
from quantgrid.reporting.tables import comparisons
from record_cases import FULL, GPTQ, RTN, evaluations

PAGE = (ROOT / "docs" / "reference" / "data.md").read_text(encoding="utf-8")
STUDY = list(collection.records(evaluations(FULL, RTN, GPTQ)).columns)
SCHEMA = yaml.safe_load((ROOT / "workflow" / "schemas" / "config.schema.yaml").read_text(encoding="utf-8"))


def table(name: str) -> list[list[str]]:
    """Rows of the table between the marks of ``name``, the first cell without its backticks."""
    marked = re.search(rf"<!-- columns: {re.escape(name)} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in marked[1].splitlines()[2:]]
    return [[column.strip("`"), *line[1:]] for line in lines for column in line[0].split(", ")]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("results.csv", list(collection.merge([pd.DataFrame(columns=STUDY)]).columns)),
        ("studies", [column for column in STUDY if column.startswith("best_")]),
        ("items", list(collection.items(evaluations(FULL, RTN)).columns)),
        ("steps.csv", list(list_steps.COLUMNS)),
        ("cells.csv", collect_results.COLUMNS),
        ("comparisons", list(comparisons.COLUMNS)),
        ("claims.csv", list(verdicts.COLUMNS)),
        ("pareto.csv", list(pareto.points(collection.records(evaluations(FULL, RTN)), {}).columns)),
        ("residual-error.csv", list(residual_error.read([]).columns)),
        ("allocations.csv", list(allocations.COLUMNS)),
    ],
)
def test_every_column_is_described_in_its_order(name, columns):
    assert [line[0] for line in table(name)] == columns
    assert all(len(line) == 4 for line in table(name))


def test_every_metric_is_described_with_its_unit_and_direction():
    lines = {line[0]: line[1:] for line in table("metrics")}
    assert set(lines) == {*METRICS, *UNITS} >= set(SCHEMA["$defs"]["metric"]["enum"])
    for name, (unit, better, *_) in lines.items():
        assert (unit, better) == (UNITS.get(name, ""), METRICS[name.removeprefix("race_")].better), name
