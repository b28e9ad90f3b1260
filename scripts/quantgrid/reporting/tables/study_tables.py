"""Table of a study's records: display strings, numbers, and marks for the best (``writers.py``
writes it to files).

Rows and columns are axes; every metric (and dataset) opens a group of columns. The full-precision
baseline opens each model's rows. Bold is the best value per metric and model; a dagger marks cells
not significantly different from it, by a paired t-test (cells share the evaluation windows, so the
variation between windows cancels), Holm-adjusted for the number of cells compared with the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd
from scipy.special import stdtr

from ...ground.errors import ConfigError
from ..data import seeds
from ..data.paired import LEVEL, holm
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
from ..data.starts import marked, noted
from ..style import metric, metric_label, value_label, with_error

MISSING, FAILED = "–", "failed"
NOTE = (
    "± one standard error. Bold: best quantized cell per metric and model. † not significantly different from the best "
    "(paired t-test, Holm-adjusted within the model, α = 0.05). –: not measured."
)


class Entry(NamedTuple):
    """One place of the table: the numbers of one record (``difference``: to the best cell, paired),
    or the reason of a failure."""

    model: str
    baseline: bool
    value: float = math.nan
    stderr: float = math.nan
    difference: float = math.nan
    difference_stderr: float = math.nan
    count: float = math.nan
    reason: str | None = None
    competes: bool = True
    start_kept: bool = False


@dataclass(frozen=True)
class Table:
    """Frames of one shape: rows indexed by the values of the ``rows`` axes, columns by (metric,
    dataset, one value per ``columns`` axis).

    ``display`` holds strings, ``values`` and ``stderrs`` float64 (NaN: failed or missing),
    ``marks`` one of '', 'best', 'tied', 'missing' or the letter of a footnote; ``baseline`` says
    which rows are full precision, ``footnotes`` maps letters to reasons, ``start_kept`` holds True
    where the cell's training kept its start, which ``display`` and ``note`` say as well.
    """

    title: str
    study: str
    rows: list[str]
    columns: list[str]
    display: pd.DataFrame
    values: pd.DataFrame
    stderrs: pd.DataFrame
    marks: pd.DataFrame
    baseline: list[bool]
    footnotes: dict[str, str]
    start_kept: pd.DataFrame
    note: str = NOTE  # meaning of errors and marks
    reference: str = ""  # for differences: the reference, appended to the header of a group

    def row_labels(self) -> list[list[str]]:
        """Return the axis values of each row for readers."""
        return [
            [value_label(axis, value) for axis, value in zip(self.rows, as_tuple(key))] for key in self.display.index
        ]

    def groups(self) -> list[tuple[str, int]]:
        """Build the upper header line: (metric with unit, dataset and better direction, number of
        columns)."""
        result: list[tuple[str, int]] = []
        for name, dataset, *_ in self.display.columns:
            text = f"{metric_label(name, dataset)}{self.reference} {metric(name).arrow}".strip()
            result = (
                [*result[:-1], (text, result[-1][1] + 1)] if result and result[-1][0] == text else [*result, (text, 1)]
            )
        return result

    def column_labels(self) -> list[str]:
        """Build the lower header line: the values of the column axes; empty strings if there are
        none."""
        return [
            ", ".join(value_label(axis, value) for axis, value in zip(self.columns, key[2:]))
            for key in self.display.columns
        ]


def as_tuple(key: Any) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def build(records: pd.DataFrame, spec: Mapping[str, Any]) -> Table:
    """Build the table of ``spec['table']``; axes that vary without a place in the spec become rows.

    :class:`ConfigError` for an unknown axis, no metrics, two cells in one place, or cells with
    different protocols. ``seeds: merged`` gives the seeds of an entry one row.
    """
    records, study, layout = tidy(records), spec.get("study", "study"), spec.get("table") or {}
    key = f"{study}: table"
    if layout.get("seeds") == "merged":
        check_one_protocol(records[records.metric.isin(layout.get("metrics", ()))], key)
        records = seeds.merged(records, spec)
    named = check_axes([*layout.get("rows", []), *layout.get("columns", [])], f"{key}.rows/columns")
    extra = left_over(records, named)
    rows = [
        *(axis for axis in extra if axis == "model"),
        *layout.get("rows", []),
        *(axis for axis in extra if axis != "model"),
    ]
    columns = list(layout.get("columns", []))
    if not rows or not layout.get("metrics"):
        raise ConfigError(
            f"{key}.{'metrics' if rows else 'rows'} is empty; accepted are "
            f"{'names of metrics' if rows else ', '.join(AXES)}"
        )
    check_one_cell_each(records, [*rows, *columns], key)
    check_one_protocol(records[records.metric.isin(layout["metrics"])], key)
    ranks = {axis: order(records, axis, spec) for axis in (*rows, *columns)}
    headers = column_keys(records, columns, ranks, layout, key)
    entries, lines = place(records, rows, columns, ranks, headers)
    if not headers or not lines:
        raise ConfigError(f"{key}: no cell of this study has been measured")
    made = Table(spec.get("title", study), study, rows, columns, **frames(entries, lines, headers))
    return replace(made, note=f"{made.note} {seeds.NOTE}") if layout.get("seeds") == "merged" else made


def column_keys(
    records: pd.DataFrame,
    columns: list[str],
    positions: Mapping[str, Mapping[str, int]],
    layout: Mapping[str, Any],
    key: str,
) -> list[tuple]:
    """List all columns: (metric, dataset, values of the column axes), metrics in the order of the
    spec, values in their order."""
    quantized = records[~is_baseline(records)]
    source = quantized if len(quantized) else records
    values = {tuple(getattr(cell, axis) for axis in columns) for cell in source.itertuples()}
    ordered = sorted(values, key=lambda group: [positions[axis].get(value, -1) for axis, value in zip(columns, group)])
    return [
        (name, dataset, *group)
        for name in layout["metrics"]
        for dataset in datasets_of(records, name, layout.get("datasets") or (), f"{key}.datasets")
        for group in ordered
    ]


def place(
    records: pd.DataFrame,
    rows: list[str],
    columns: list[str],
    positions: Mapping[str, Mapping[str, int]],
    headers: list[tuple],
) -> tuple[dict[tuple, Entry], list[tuple]]:
    """Place the records: ``({(row key, column key): entry}, row keys in order)``; a baseline fills
    every column of its model."""
    entries: dict[tuple, Entry] = {}
    ranks: dict[tuple, list[float]] = {}
    for record, baseline in zip(records.itertuples(), is_baseline(records)):
        row, rank = row_key(record, rows, positions, bool(baseline))
        ranks[row] = rank
        for header in headers:
            own = all(
                getattr(record, axis) == value or (baseline and axis != "model")
                for axis, value in zip(columns, header[2:])
            )
            if own and says_failed(record, header[0], header[1]):
                entries.setdefault(
                    (row, header), Entry(record.model, bool(baseline), reason=record.reason or "no reason recorded")
                )
            elif own and (record.metric, record.dataset) == header[:2] and not math.isnan(record.value):
                samples = (
                    math.inf if record.metric == "mean_accuracy" else record.count
                )  # normal distribution for a mean over tasks: tasks are few, outcomes many
                numbers = (record.value, record.stderr, record.best_difference, record.best_difference_stderr, samples)
                entries[row, header] = Entry(
                    record.model,
                    bool(baseline),
                    *numbers,
                    competes=record.mitigation != "none" and seeds.JOINED not in record.cell,
                    start_kept=record.start_kept == "all",
                )
    return entries, sorted(ranks, key=ranks.__getitem__)


def row_key(
    record: Any, rows: list[str], positions: Mapping[str, Mapping[str, int]], baseline: bool
) -> tuple[tuple, list[float]]:
    """Return the row's index and its rank; a baseline precedes all other rows of its model, or of
    all models if the model is not the first axis."""
    if not baseline:
        values = tuple(getattr(record, axis) for axis in rows)
        return values, [positions[axis][value] for axis, value in zip(rows, values)]
    model_position = positions.get("model", {}).get(record.model, 0)
    if rows == ["model"]:
        return (f"{record.model}, {FULL_PRECISION}",), [model_position - 0.5]
    others = [axis for axis in rows if axis != "model"]
    names = dict.fromkeys(others, MISSING) | {others[0]: FULL_PRECISION, "model": record.model}
    return tuple(names[axis] for axis in rows), [model_position if axis == "model" else -1 for axis in rows]


def frames(entries: Mapping[tuple, Entry], rows: list[tuple], headers: list[tuple]) -> dict[str, Any]:
    """Build the frames of a :class:`Table` with its notes; footnotes are lettered in reading order,
    one letter per reason."""
    places = [[(row, header) for header in headers] for row in rows]
    reasons = (entries[at].reason for line in places for at in line if at in entries)
    letters = {
        reason: letter(number)
        for number, reason in enumerate(dict.fromkeys(reason for reason in reasons if reason is not None))
    }
    best = best_marks(entries)

    def frame(content: Callable[[tuple, Entry], Any], absent: Any, kind: Any) -> pd.DataFrame:
        cells = [[content(at, entries[at]) if at in entries else absent for at in line] for line in places]
        return pd.DataFrame(
            cells, index=pd.MultiIndex.from_tuples(rows), columns=pd.MultiIndex.from_tuples(headers), dtype=kind
        )

    kept = frame(lambda _, entry: entry.start_kept, False, bool)
    return {
        "display": frame(lambda _, entry: display(entry), MISSING, object),
        "values": frame(lambda _, entry: entry.value, math.nan, "float64"),
        "stderrs": frame(lambda _, entry: entry.stderr, math.nan, "float64"),
        "marks": frame(
            lambda at, entry: best.get(at, "") if entry.reason is None else letters[entry.reason], "missing", object
        ),
        "baseline": [any(at in entries and entries[at].baseline for at in line) for line in places],
        "footnotes": {name: reason for reason, name in letters.items()},
        "start_kept": kept,
        "note": noted(NOTE, kept),
    }


def display(entry: Entry) -> str:
    """Format a place: its value, marked if a training kept its start, or that the cell failed."""
    return FAILED if entry.reason is not None else marked(with_error(entry.value, entry.stderr), entry.start_kept)


def letter(number: int) -> str:
    """Name a footnote: 0 -> a, 25 -> z, 26 -> aa."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def best_marks(entries: Mapping[tuple, Entry]) -> dict[tuple, str]:
    """Mark the quantized cells per metric, dataset and model: ``{place: 'best' or 'tied'}``; no
    marks if all values are equal."""
    groups: dict[tuple, list[tuple]] = {}
    for at, entry in entries.items():
        name, dataset = at[1][:2]
        if metric(name).better and entry.competes and entry.reason is None:
            groups.setdefault((name, dataset, entry.model), []).append(at)
    marks: dict[tuple, str] = {}
    for (name, *_), places in groups.items():
        values = [entries[at].value for at in places]
        best = (min if metric(name).better == "lower" else max)(values)
        if min(values) == max(values):
            continue
        others = [at for at in places if entries[at].value != best]
        adjusted = holm([p_value(entries[at]) for at in others])
        marks |= {at: "best" for at in places if entries[at].value == best} | {
            at: "tied" if p >= LEVEL else "" for at, p in zip(others, adjusted)
        }
    return marks


def p_value(entry: Entry) -> float:
    """Compute the two-sided p-value of a zero paired difference to the best cell (t-test); 0 if it
    has no error or no count."""
    if not entry.difference_stderr > 0 or not entry.count > 1:
        return 0.0
    return float(2 * stdtr(entry.count - 1, -abs(entry.difference) / entry.difference_stderr))
