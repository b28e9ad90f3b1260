"""Comparisons of the cells of a study with their counterparts that differ on one axis alone:
``compare: {axis: mitigation, to: gptq}`` of a study.

Differences are paired: losses, divergences or outcomes of the same windows or samples. A difference
of negative log-likelihoods in nats per token is the logarithm of the ratio of two perplexities:
0.01 is 1 % of perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.paired import LEVEL, estimate, holm
from ..data.records import AXES, is_baseline, left_over, order, tidy
from ..data.starts import kept, marked, noted
from ..style import value_label, with_error
from .study_tables import MISSING, Table

NOTE = (
    "Paired differences ± standard error; negative is better, of accuracies positive. Bold: significantly different: "
    "paired t-test over windows or samples, "
    "Holm-adjusted over the table (α = 0.05), and a bootstrap interval without 0. † not significant. –: no such cell."
)
NOTHING = "Nothing could be compared: the cells that differ in one axis alone failed.\n"
COLUMNS = (
    *AXES,
    "metric",
    "dataset",
    "effect",
    "stderr",
    "low",
    "high",
    "p",
    "p_adjusted",
    "count",
    "differs",
    "start_kept",
)


def evaluate(records: pd.DataFrame, items: pd.DataFrame, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Evaluate all comparisons of ``spec['compare']``, one row each (``COLUMNS``; the axes are
    those of the compared cell; ``start_kept`` names ``cell`` or ``counterpart``, or both, if its
    training kept its start).

    ``records`` are a study's, ``items`` the per-window and per-sample values (cell, metric,
    dataset, item, value). Failed cells and cells without a counterpart are skipped; the result may
    be empty.
    """
    wanted, records = spec["compare"], tidy(records)
    quantized = records[(records.status == "ok") & ~is_baseline(records)].drop_duplicates("cell")
    shared = [axis for axis in AXES if axis != wanted["axis"]]
    reference = quantized[quantized[wanted["axis"]] == wanted["to"]].set_index(shared).cell
    values = {
        key: part.sort_values("item").value.to_numpy()
        for key, part in items.groupby(["cell", "metric", "dataset"], sort=False)
    }
    rows = [
        row
        for cell in quantized.itertuples()
        if (place := tuple(getattr(cell, axis) for axis in shared)) in reference.index
        for row in _rows(cell, reference[place], wanted, values, kept(records))
    ]
    result = pd.DataFrame(rows, columns=list(COLUMNS))
    result["p_adjusted"] = holm(result.p.tolist())
    result["differs"] = (result.p_adjusted < LEVEL) & ~((result.low <= 0) & (result.high >= 0))
    return result


def _rows(
    cell: Any,
    reference: str,
    wanted: Mapping[str, Any],
    values: Mapping[tuple[str, str, str], np.ndarray],
    marked_cells: set[str],
) -> Iterator[dict[str, Any]]:
    if cell.cell == reference:
        return
    starts = " and ".join(
        name for name, key in (("cell", cell.cell), ("counterpart", reference)) if key in marked_cells
    )
    for key, own in values.items():
        if key[0] == cell.cell and key[1] in wanted["metrics"] and (reference, *key[1:]) in values:
            differences = own - values[reference, *key[1:]]
            effect, low, high, p = estimate([differences])
            error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.nan
            yield {
                **{axis: getattr(cell, axis) for axis in AXES},
                "metric": key[1],
                "dataset": key[2],
                "effect": effect,
                "stderr": error,
                "low": low,
                "high": high,
                "p": p,
                "count": len(differences),
                "start_kept": starts,
            }


def table(compared: pd.DataFrame, spec: Mapping[str, Any]) -> Table:
    """Arrange the comparisons, at least one, as a table: a column per compared value, a row per
    value of the other axes that are placed or vary."""
    wanted, study = spec["compare"], spec["study"]
    axis, frame = wanted["axis"], compared.assign(cell=range(len(compared)), status="ok")
    placed = [name for name in (*spec["table"]["rows"], *spec["table"]["columns"]) if name != axis]
    rows = [*left_over(frame, [axis, *placed]), *placed] or [next(name for name in AXES if name != axis)]
    ranks = {name: order(frame, name, spec) for name in (axis, *rows)}
    lines = sorted(
        {tuple(getattr(row, name) for name in rows) for row in frame.itertuples()},
        key=lambda line: [ranks[name][value] for name, value in zip(rows, line)],
    )
    datasets = {metric: list(dict.fromkeys(frame[frame.metric == metric].dataset)) for metric in wanted["metrics"]}
    headers = [
        (metric, dataset, value)
        for metric, found in datasets.items()
        for dataset in found
        for value in sorted(ranks[axis], key=ranks[axis].__getitem__)
    ]
    entries = {
        (tuple(getattr(row, name) for name in rows), (row.metric, row.dataset, getattr(row, axis))): row
        for row in frame.itertuples()
    }

    def filled(content: Any, absent: Any, kind: Any) -> pd.DataFrame:
        cells = [
            [content(entries[line, header]) if (line, header) in entries else absent for header in headers]
            for line in lines
        ]
        return pd.DataFrame(
            cells, index=pd.MultiIndex.from_tuples(lines), columns=pd.MultiIndex.from_tuples(headers), dtype=kind
        )

    start_kept = filled(lambda row: bool(row.start_kept), False, bool)
    return Table(
        f"{spec.get('title', study)}: differences to {value_label(axis, wanted['to'])}",
        f"{study}-compared",
        rows,
        [axis],
        filled(lambda row: marked(with_error(row.effect, row.stderr), bool(row.start_kept)), MISSING, object),
        filled(lambda row: row.effect, np.nan, "float64"),
        filled(lambda row: row.stderr, np.nan, "float64"),
        filled(lambda row: "best" if row.differs else "tied", "missing", object),
        [False] * len(lines),
        {},
        start_kept,
        noted(NOTE, start_kept),
        f", less that of {value_label(axis, wanted['to'])}",
    )


def read(path: str | Path) -> pd.DataFrame:
    """Read the comparisons of :func:`evaluate` from their CSV."""
    return pd.read_csv(
        path,
        dtype=dict.fromkeys((*AXES, "metric", "dataset", "start_kept"), str),
        keep_default_na=False,
        na_values={"stderr": ""},
    )
