"""Tables of the documents fit beside a text: at most eight columns."""

from __future__ import annotations

import re

import pytest

from checkouts import ROOT
from quantgrid.reporting.tables.parts import WIDEST

DOCUMENTS = sorted(
    path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "config").glob("*.md")]
)
SEPARATOR = re.compile(r"(?<!\\)\|")


def widths(text: str) -> list[int]:
    """Columns of every table line outside of code blocks."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [len(SEPARATOR.findall(line)) - 1 for line in prose.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_table_has_more_than_eight_columns(path):
    assert max(widths(path.read_text(encoding="utf-8")), default=0) <= WIDEST


def test_columns_are_counted():
    assert widths("| a | b\\|c |\n| :-- | --: |\n```\n| a | b | c |\n```\n") == [2, 2]
