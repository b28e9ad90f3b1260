"""Parts of a table that fit on a page: one metric each where an axis stands in the columns, divergence
first, and at most ``WIDEST`` columns."""

from __future__ import annotations

from dataclasses import replace

from .study_tables import Table

WIDEST = 8  # columns of a part, those of the row axes among them
FIRST = ("kl_divergence",)  # metrics that come first


def parts(table: Table) -> list[Table]:
    """Split a table by metric and dataset, then by width; the columns of metrics without a column axis
    share a part as far as they fit."""
    room = max(1, WIDEST - len(table.rows))
    found: list[list[int]] = []
    for group in groups(table):
        pieces = [group[at : at + room] for at in range(0, len(group), room)]
        if found and not table.columns and len(found[-1]) + len(group) <= room:
            found[-1] += group
        else:
            found += pieces
    return [part(table, columns) for columns in found]


def groups(table: Table) -> list[list[int]]:
    """List the positions of the columns of each metric and dataset, divergence first."""
    found: dict[tuple[str, str], list[int]] = {}
    for position, (name, dataset, *_) in enumerate(table.display.columns):
        found.setdefault((name, dataset), []).append(position)
    return [found[key] for key in sorted(found, key=lambda key: key[0] not in FIRST)]


def part(table: Table, columns: list[int]) -> Table:
    """Restrict a table to some of its columns, and to the footnotes that they use."""
    marks = table.marks.iloc[:, columns]
    used = set(marks.to_numpy().ravel())
    return replace(
        table,
        display=table.display.iloc[:, columns],
        values=table.values.iloc[:, columns],
        stderrs=table.stderrs.iloc[:, columns],
        marks=marks,
        start_kept=table.start_kept.iloc[:, columns],
        footnotes={name: reason for name, reason in table.footnotes.items() if name in used},
    )
