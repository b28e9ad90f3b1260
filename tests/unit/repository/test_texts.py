"""Shipped texts and tasks: the files of NOTICE, complete, and read as their README says."""

from __future__ import annotations

import gzip
import hashlib
import json
import re

import pytest
import yaml

from checkouts import ROOT
from quantgrid.corpora.documents import read_local
from quantgrid.corpora.token_windows import join
from quantgrid.evaluation import task_documents

FILES = sorted((ROOT / "texts").glob("*.gz"))
EXAMPLE = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (ROOT / "texts" / "README.md").read_text(), re.DOTALL)[1])


def test_notice_names_every_file_by_its_digest():
    notice = (ROOT / "NOTICE").read_text()
    named = dict(re.findall(r"^(texts/\S+)$.*?sha256 ([0-9a-f]{64})$", notice, re.MULTILINE | re.DOTALL))
    assert named == {f"texts/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in FILES}


def test_the_readme_counts_the_records():
    counted = re.findall(r"^\| `(\S+)` \|.*\| (\d+) \|", (ROOT / "texts" / "README.md").read_text(), re.MULTILINE)
    assert dict(counted) == {path.name: str(len(gzip.decompress(path.read_bytes()).splitlines())) for path in FILES}


def test_wikitext_is_the_published_text():
    """Bytes and lines of wiki.test.raw, and the protocol: all lines, blank ones too, joined by blank
    lines."""
    entry = EXAMPLE["corpora"]["wikitext2"]
    rows = [text for _, text in read_local({**entry, "path": str(ROOT / entry["path"])}, "corpora.wikitext2")]
    assert len(rows) == 4358 and sum(len((row or " \n").encode()) for row in rows) == 1_290_590
    assert join(entry, rows).startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    titles = [row for row in rows if re.fullmatch(r" = [^=].*[^=] = \n", row)]
    assert len(titles) == 62 and sum(" k = " in row or "C = " in row for row in titles) == 2  # two are formulas


@pytest.mark.parametrize("name", EXAMPLE["tasks"])
def test_tasks_are_read_as_the_readme_says(name):
    entry = EXAMPLE["tasks"][name]
    found = task_documents.read_documents({**entry, "path": str(ROOT / entry["path"])}, f"tasks.{name}")
    with gzip.open(ROOT / entry["path"], "rt", encoding="utf-8") as file:
        assert len(found) == len([json.loads(line) for line in file])
