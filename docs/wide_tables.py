"""Split Markdown tables with more than eight columns, which scroll sideways on a forge: one metric per
table, divergence first, or the columns in turn with the labels repeated.

    python docs/wide_tables.py docs/explanation/performance.md ...
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

WIDEST = 8
FIRST = "KL divergence"
BREAK = "<br>"  # in a header between a metric and the value of the column axis
SEPARATOR = re.compile(r"(?<!\\)\|")

Rows = list[list[str]]


def split_text(text: str) -> str:
    """Split the wide tables of a document; everything else is unchanged."""
    found: list[str] = []
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        block = list(lines)
        found += split(block) if is_table else block
    return "\n".join(found) + "\n"


def split(lines: list[str]) -> list[str]:
    """Split one table, given as its lines, into tables below each other."""
    rows = [[cell.strip() for cell in SEPARATOR.split(line)[1:-1]] for line in lines]
    if len(rows[0]) <= WIDEST:
        return lines
    found: list[str] = []
    for metric, columns in parts(rows):
        heads = [rows[0][column].rpartition(BREAK)[2] if metric else rows[0][column] for column in columns]
        body = [heads, *([row[column] for column in columns] for row in rows[1:])]
        found += [*([f"{metric}:", ""] if metric else []), *(f"| {' | '.join(row)} |" for row in body), ""]
    return found[:-1]


def parts(rows: Rows) -> list[tuple[str, list[int]]]:
    """List the parts of a table: its metric, if its columns have several, and the positions of its
    columns, the leading labels among them."""
    heads, width = rows[0], len(rows[0])
    labels = [
        column for column in range(width) if column == 0 or (rows[1][column] == ":--" and BREAK not in heads[column])
    ]
    labels = [column for at, column in enumerate(labels) if column == at][: WIDEST - 2]
    others = [column for column in range(width) if column not in labels]
    metrics = dict.fromkeys(heads[column].rpartition(BREAK)[0] for column in others)
    ordered = sorted(metrics, key=lambda metric: not metric.startswith(FIRST))
    room, found = WIDEST - len(labels), []
    for metric in ordered:
        own = [column for column in others if heads[column].rpartition(BREAK)[0] == metric]
        found += [(metric, [*labels, *own[at : at + room]]) for at in range(0, len(own), room)]
    return found


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(split_text(path.read_text(encoding="utf-8")), encoding="utf-8")
