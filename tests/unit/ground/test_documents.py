"""Documents made of results: no damaged file gets into them, and what is kept of a run makes its
page."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from checkouts import ROOT
from quantgrid.jobs.integrity import Damaged, origin_of, write_record
from quantgrid.reporting.data.records import NUMBERS, TEXTS

sys.path.insert(0, str(ROOT / "docs"))

import evidence_tables
import pictures
import run_pages
import update

STUDY = {
    "title": "Methods",
    "table": {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity"]},
    "figure": {"kind": "dots", "x": "mitigation", "hue": "transform", "metric": "perplexity"},
}
VERIFIED = ("studies/methods.csv", "comparisons/methods.csv", "studies/methods.items.parquet", "learning.png")


CELLS = (("none", "-", "bf16", 8.0), ("rtn", "channel", "int4", 9.5), ("gptq", "channel", "int4", 8.75))
SHAPE = {"architecture": "LlamaForCausalLM", "hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2}
SHAPE |= {"kv_heads": 2, "head_dim": 32, "vocabulary": 8}
MODEL = {"source": "hub", "id": "a/m", "revision": "main", "shape": SHAPE}


def records(cells: Sequence[tuple[str, str, str, float]] = CELLS) -> str:
    """Records of full precision and two cells, as a study leaves them."""
    rows = [
        {"cell": f"{mitigation}-{form}", "model": "m", "transform": "none", "mitigation": mitigation}
        | {"granularity": granularity, "format": form, "status": "ok", "metric": "perplexity", "dataset": "docs"}
        | {"value": value, "count": 4}
        for mitigation, granularity, form, value in cells
    ]
    return pd.DataFrame(rows, columns=[*TEXTS, *NUMBERS, "protocol"]).to_csv(index=False)


def items(cells: Sequence[tuple[str, str, str, float]] = CELLS) -> bytes:
    """Loss and divergence of the cells in 32 windows, and an accuracy, which no claim is about."""
    rows = [
        {"cell": f"{mitigation}-{form}", "metric": metric, "dataset": "docs", "item": item}
        | {"value": math.log(value) + 0.001 * (item % 5)}
        for mitigation, _, form, value in cells
        for metric in ("negative_log_likelihood", "kl_divergence", "accuracy")
        for item in range(32)
    ]
    return pd.DataFrame(rows).to_parquet(index=False)


def recorded(*paths: Path) -> None:
    """Record the files as those of their jobs."""
    for (rule, _), own in groupby(sorted(paths, key=job_of), key=job_of):
        write_record(rule, own)


def job_of(path: Path) -> tuple[str, str]:
    return origin_of(path).rule, origin_of(path).record


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder with a record for each of the files that documents are made of."""
    folder = tmp_path / "results"
    contents = {"studies/methods.csv": records(), "comparisons/methods.csv": "model\n"}
    contents |= {"benchmarks/quantize_model/m/none/rtn/channel/int4/1.tsv": "s\tmax_rss\tcpu_time\n3\t100\t2\n"}
    for place, content in contents.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(content)
    (folder / "studies" / "methods.items.parquet").write_bytes(items())
    Image.new("RGB", (2, 2)).save(folder / "learning.png")
    (folder / "benchmarks" / "list_steps").mkdir()  # of a version that recorded less
    (folder / "benchmarks" / "list_steps" / "all.tsv").write_text("s\n1\n")
    recorded(*(folder / place for place in VERIFIED))
    config = {"results_dir": "results", "models": {"m": MODEL}, "studies": {"methods": STUDY}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs" / "runs").mkdir(parents=True)
    for module in (update, run_pages, pictures):
        for name, value in {"ROOT": tmp_path, "DOCS": tmp_path / "docs"}.items():
            monkeypatch.setattr(module, name, value, raising=False)
    runs = {"runs/some-run": ("Some run", "config.yaml", "make run")}
    monkeypatch.setattr(run_pages, "RUNS", runs)
    monkeypatch.setattr(update, "RUNS", runs)
    return folder


@pytest.mark.parametrize("place", VERIFIED)
def test_a_damaged_file_ends_the_making_of_documents(results: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    path = results / place
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(run_pages, "REPORTED", ("runs/some-run",))
    with pytest.raises(Damaged, match=f"{place}: its content has changed"):
        run_pages.keep_run("runs/some-run", "abc1234")
    assert not list((results.parent / "docs").rglob("*.md"))


def test_a_page_is_made_of_what_is_kept_alone(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_pages, "FRONTS", ("runs/some-run",))
    run_pages.keep_run("runs/some-run", "abc1234")
    archive = results.parent / "docs" / "runs" / "some.tar.xz"
    content = archive.read_bytes()
    run_pages.keep_run("runs/some-run", "abc1234")
    assert archive.read_bytes() == content, "equal records are equal archives"
    results.rename(results.with_name("gone"))
    run_pages.keep_run("runs/some-run", "def5678")
    (results.parent / "config.yaml").write_text("results_dir: results\nmodels: {}\nstudies: {another: {}}\n")
    run_pages.document("runs/some-run")
    page = (results.parent / "docs" / "runs" / "some-run.md").read_text()
    assert "computed at commit abc1234" in page and "| no transform | 9.500 | **8.750** |" in page
    assert "![some-methods](some-methods.webp)" in page and "![some-learning](some-learning.webp)" in page
    assert "| quantize_model | 1 | 3 | 2 | 3 | 100 |" in page
    assert page.count("![some-pareto](some-pareto.webp)") == 1 and (archive.parent / "some-pareto.webp").is_file()
    readme = results.parent / "README.md"
    readme.write_text("<!-- table: methods -->\ncomputed at commit 123\n")
    update.front_page(readme)
    assert "| no transform | 9.500 | **8.750** |" in readme.read_text() and "commit abc1234" in readme.read_text()


def test_a_run_in_parts_keeps_the_studies_of_earlier_parts(results: Path):
    """Each with the commit at which its records changed; a study that the config no longer has goes."""
    page, archive = (results.parent / "docs" / "runs" / name for name in ("some-run.md", "some.tar.xz"))
    config = yaml.safe_load((results.parent / "config.yaml").read_text())
    config["studies"] |= {"second": {**STUDY, "title": "Second"}, "third": {**STUDY, "title": "Third"}}
    (results.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run_pages.keep_run("runs/some-run", "abc1234")
    run_pages.document("runs/some-run")
    assert "computed at commit abc1234. Not computed yet: second, third." in page.read_text()
    for folder in ("studies", "comparisons"):
        (results / folder / "methods.csv").rename(results / folder / "second.csv")
        recorded(results / folder / "second.csv")
    for _ in range(2):
        run_pages.keep_run("runs/some-run", "def5678")
    run_pages.keep_run("runs/some-run", "fed8765")
    run_pages.document("runs/some-run")
    text = page.read_text()
    assert "Not computed yet: third." in text and "each study at the commit below its table" in text
    assert text.index("## Methods\n") < text.index("commit abc1234") < text.index("## Second\n")
    assert text.index("## Second\n") < text.index("commit def5678") and "fed8765" not in text
    with run_pages.kept(archive) as (folder, about):
        assert list(about["studies"]) == ["methods", "second"] and (folder / "comparisons" / "second.csv").is_file()
    del config["studies"]["methods"]
    (results.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run_pages.keep_run("runs/some-run", "fed8765")
    run_pages.document("runs/some-run")
    assert "## Methods\n" not in page.read_text() and "computed at commit def5678" in page.read_text()


def test_a_job_that_a_later_part_makes_again_counts_once(results: Path):
    """Its key is another one where the code has changed."""
    page, config = results.parent / "docs" / "runs" / "some-run.md", results.parent / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["studies"] |= {"second": {**STUDY, "title": "Second"}}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    cell = results / "benchmarks" / "quantize_model" / "m" / "none" / "rtn" / "channel" / "int4"
    (cell / "1.tsv").rename(cell / "0123456789.tsv")
    run_pages.keep_run("runs/some-run", "abc1234")
    for folder in ("studies", "comparisons"):
        (results / folder / "methods.csv").rename(results / folder / "second.csv")
        recorded(results / folder / "second.csv")
    (cell / "0123456789.tsv").rename(cell / "abcdef0123.tsv")
    (cell.parent / "fp4").mkdir()
    (cell.parent / "fp4" / "89abcdef01.tsv").write_text("s\tmax_rss\tcpu_time\n5\t100\t2\n")
    run_pages.keep_run("runs/some-run", "def5678")
    run_pages.document("runs/some-run")
    assert "| quantize_model | 2 | 8 | 4 | 5 | 100 |" in page.read_text()


def test_findings_are_judged_on_the_windows_of_all_parts(results: Path, monkeypatch: pytest.MonkeyPatch):
    """A comparison of two cells of different parts, and none of a study that the config no longer has."""
    monkeypatch.setattr(run_pages, "REPORTED", ("runs/some-run",))
    archive = results.parent / "docs" / "runs" / "some.tar.xz"
    config = yaml.safe_load((results.parent / "config.yaml").read_text())
    config["studies"]["symmetric"] = {**STUDY, "title": "Symmetric"}
    (results.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def made() -> dict[str, str]:
        run_pages.keep_run("runs/some-run", "def5678")
        with run_pages.kept(archive) as (folder, about):
            return evidence_tables.tables(folder, about)

    first = made()
    assert "Asymmetric activations" not in first["findings"] and "Not computed yet: symmetric." in first["parts"]
    later = (CELLS[0], ("gptq", "channel", "int4_sym", 9.7))
    contents = {"symmetric.csv": records(later).encode(), "symmetric.items.parquet": items(later)}
    for name, content in contents.items():
        (results / "studies" / name).write_bytes(content)
    recorded(*(results / "studies" / name for name in contents))
    for path in (results / "studies").glob("methods*"):
        path.unlink()
    found = [made(), made()][-1]
    change = 100 * (9.7 / 8.75 - 1)
    for said in (
        "| Asymmetric activations help much",
        "**✓ holds**<br>1 of 1 hold",
        f"+{change:.1f} % (+{change:.1f} to",
    ):
        assert said in found["findings"]
    assert "| m | perplexity | 1 |" in found["counted"] and "2 jobs, 0.0 hours of one processor" in found["parts"]
    assert "| methods | m | 2 | def5678 |\n| symmetric | m | 1 | def5678 |" in found["parts"]
    with run_pages.kept(archive) as (folder, _):
        kept = pd.read_parquet(folder / "items.parquet")
    assert set(kept.metric) == {"negative_log_likelihood", "kl_divergence"} and len(kept) == 4 * 2 * 32
    del config["studies"]["methods"]
    (results.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert "Asymmetric activations" not in made()["findings"]


def test_figures_are_narrow_and_linked_from_a_document_of_their_folder(results: Path):
    wide = results / "wide.png"
    Image.new("RGB", (2 * pictures.WIDTH, 20), "red").save(wide)
    assert pictures.drawn(wide.read_bytes(), "runs/some-wide") == "![some-wide](some-wide.webp)\n"
    with Image.open(results.parent / "docs" / "runs" / "some-wide.webp") as shown:
        assert shown.size == (pictures.WIDTH, 10) and shown.getpixel((0, 0))[0] > 250


def test_a_benchmark_that_runs_again_replaces_its_rows_and_no_others(tmp_path: Path):
    path = tmp_path / "benchmarks.csv"
    names = [*update.CASE, "milliseconds", "commit"]

    def made(*rows: tuple[str, str, str, str]) -> pd.DataFrame:
        return pd.DataFrame([[name, case, "cpu", "1", "peer", *rest] for name, case, *rest in rows], columns=names)

    update.with_kept(made(("a", "x", "1", "old"), ("a", "y", "2", "old"), ("b", "x", "3", "old")), path)
    found = update.with_kept(made(("a", "y", "5", "new"), ("a", "z", "6", "new"), ("c", "x", "7", "new")), path)
    again = pd.read_csv(path, dtype=str)
    assert found.milliseconds.tolist() == again.milliseconds.tolist() == ["1", "5", "6", "3", "7"]
    assert again.commit.tolist() == ["old", "new", "new", "old", "new"]
