"""Documents made of results: no damaged file gets into them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from checkouts import ROOT
from quantgrid.jobs.integrity import Damaged, origin_of, write_record

sys.path.insert(0, str(ROOT / "docs"))

import run_costs
import update

READERS = {
    "claims.csv": update.claims,
    "results.csv": run_costs.spread,
    "learning.png": lambda results: update.trainings(results, "some"),
    "tables/methods.md": lambda results: update.document("some-run", "abc"),
    "comparisons/methods.md": lambda results: update.document("some-run", "abc"),
    "figures/methods.png": lambda results: update.document("some-run", "abc"),
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder with a record for each of the files that documents are made of."""
    folder = tmp_path / "results"
    for place in READERS:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (2, 2)).save(path)
        else:
            path.write_text("a line\n")
        write_record(origin_of(path).rule, [path])
    config = {"results_dir": "results", "studies": {"methods": {"title": "Methods"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(update, "ROOT", tmp_path)
    monkeypatch.setattr(update, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(update, "RUNS", {"some-run": ("Some run", "config.yaml", "make run")})
    return folder


@pytest.mark.parametrize("place", READERS)
def test_a_damaged_file_ends_the_making_of_documents(results: Path, place: str):
    path = results / place
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged, match=f"{place}: its content has changed"):
        READERS[place](results)
    assert not list((results.parent / "docs").iterdir())


def test_tables_of_the_readme_are_verified(results: Path):
    readme = results.parent / "README.md"
    readme.write_text("<!-- table: methods -->\n")
    update.front_page(results / "tables", readme, "abc")
    assert readme.read_text() == "<!-- table: methods -->\na line\n<!-- end -->\n"
    (results / "tables" / "methods.md").write_text("a lie.\n")
    with pytest.raises(Damaged, match="methods"):
        update.front_page(results / "tables", readme, "def")


def test_figures_are_narrow_and_linked_from_a_document_of_their_folder(results: Path):
    wide = results / "figures" / "wide.png"
    Image.new("RGB", (2 * update.WIDTH, 20), "red").save(wide)
    (results.parent / "docs" / "runs").mkdir()
    assert update.drawn(wide.read_bytes(), "runs/some-wide") == "![some-wide](some-wide.webp)\n"
    with Image.open(results.parent / "docs" / "runs" / "some-wide.webp") as shown:
        assert shown.size == (update.WIDTH, 10) and shown.getpixel((0, 0))[0] > 250
