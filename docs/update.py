"""Bring the results of `make run` into the documents: `make docs`. Every number of the README and
of docs/ comes through here.

First the records of the runs whose results folders are there replace those kept in docs/runs/
(`run_files.py`); what a job left is verified before it is read, and a damaged file ends the
command. Then all pages are built from what is kept.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from evidence_tables import tables as evidence  # noqa: E402 (the library is in scripts/, not installed)
from oddities_tables import TABLES as ODDITIES  # noqa: E402
from pictures import DOCS, drawn  # noqa: E402
from reference_cards import TABLES as CARDS  # noqa: E402
from result_tables import EXCERPTS, excerpt  # noqa: E402
from run_files import kept  # noqa: E402
from run_pages import REPORTED, RUNS, archive, document, keep_run, table  # noqa: E402
from wide_tables import split_text  # noqa: E402

from quantgrid.config import validation  # noqa: E402
from quantgrid.jobs import job  # noqa: E402
from quantgrid.plan.estimates import text as estimate  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402

CASE = ["benchmark", "case", "device", "threads", "reference"]  # what a row of the benchmarks measures
COMMIT = re.compile(r"computed at commit \w+")
# Table in the results folder -> the command that makes it.
BENCHMARKS = {"benchmarks": "bench", "benchmarks-plan": "bench-plan", "benchmarks-growth": "bench-growth"}
TEXTS = ("commit", "benchmark", "case", "device", "reference", "reached", "against", "quantity", "grows_faster")
MARKED = re.compile(r"<!-- table: (\S+) -->\n(?:.*?<!-- end -->\n)?", re.DOTALL)


def between(page: str, mark: str, text: str) -> None:
    """Put ``text`` into a page of docs/, between its marks, wide tables split."""
    text = split_text(text).rstrip("\n")
    marked = re.compile(rf"<!-- {mark} -->\n.*?<!-- end -->\n", re.DOTALL)
    (DOCS / page).write_text(
        marked.sub(lambda _: f"<!-- {mark} -->\n{text}\n<!-- end -->\n", (DOCS / page).read_text())
    )


def benchmarks(name: str, commit: str) -> None:
    """Write the table of a benchmark from the results folder into performance.md between its marks,
    with its figure; nothing if it was not run."""
    source = ROOT / "results" / f"{name}.csv"
    if not source.is_file():
        return
    found = pd.read_csv(source, dtype=str, keep_default_na=False)
    if "commit" in found:  # rows of their own commits: other benchmarks keep theirs
        found = with_kept(found, DOCS / "explanation" / f"{name}.csv")
    found = found.loc[:, (found != "").any()].drop(columns="repeats", errors="ignore")
    head = [[column.replace("_", " ") for column in found], [":--" if column in TEXTS else "--:" for column in found]]
    at = "each row at its commit" if "commit" in found else f"computed at commit {commit}"
    made = f"By `make {BENCHMARKS[name]}` and `make docs` on 2 cores of an x86-64 processor, {at}."
    text = [made, "", *(f"| {' | '.join(row)} |" for row in [*head, *found.values.tolist()])]
    if source.with_suffix(".png").is_file():
        text += ["", drawn(source.with_suffix(".png").read_bytes(), f"explanation/{name}").rstrip()]
    between("explanation/performance.md", name, "\n".join(text))


def with_kept(found: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Put the rows of ``found`` in place of the kept ones of the same case, new ones behind those of their
    benchmark, and keep the result at ``path``. A case that is no longer measured keeps its row until it is
    deleted there."""
    if path.is_file():
        before = pd.read_csv(path, dtype=str, keep_default_na=False)
        places = {name: at for at, name in enumerate(dict.fromkeys([*before.benchmark, *found.benchmark]))}
        cases, again = ([*frame[CASE].itertuples(index=False, name=None)] for frame in (before, found))
        first = {row: at for at, row in reversed([*enumerate(cases)])}
        every = pd.concat([before[[row not in again for row in cases]], found]).fillna("")
        order = [(places[row[0]], first.get(row, len(first))) for row in every[CASE].itertuples(index=False, name=None)]
        found = every.iloc[sorted(range(len(every)), key=order.__getitem__)]
    found.to_csv(path, index=False, lineterminator="\n")
    return found


def front_page(readme: Path) -> None:
    """Put tables of the kept default run into the README between their marks; nothing where none is
    kept."""
    name = next(iter(RUNS))
    if not archive(name).is_file():
        return
    with kept(archive(name)) as (folder, about):

        def filled(found: re.Match) -> str:
            text = split_text(table(folder, {**about["studies"][found[1]], "study": found[1]}))
            return f"<!-- table: {found[1]} -->\n{text}<!-- end -->\n"

        text = readme.read_text()
        commits = ", ".join(sorted({about["commits"][name] for name in MARKED.findall(text)}))
        readme.write_text(COMMIT.sub(f"computed at commit {commits}", MARKED.sub(filled, text)))


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    for name in RUNS:
        keep_run(name, commit)
        document(name)
    for name in filter(lambda name: archive(name).is_file(), REPORTED):
        with kept(archive(name)) as (folder, about):
            for mark, text in evidence(folder, about).items():
                between("evidence.md", mark, text)
    for (page, mark), wanted in EXCERPTS.items():
        with kept(archive(wanted.run)) as (folder, about):
            between(page, mark, excerpt(folder, about, wanted))
    for name in BENCHMARKS:
        benchmarks(name, commit)
    command = [
        sys.executable,
        str(ROOT / "tests" / "benchmarks" / "larger_than_memory.py"),
        "--stated",
        str(128 * 2048),
    ]
    between(
        "explanation/performance.md",
        "stated",
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(),
    )
    between(
        "how-to/cluster.md", "preflight", f"```\n{estimate(Plan(validation.load(ROOT / 'config' / 'paper.yaml')))}\n```"
    )
    for mark, card in CARDS.items():
        between("explanation/reference-models.md", mark, card(ROOT / "models"))
    if (ROOT / "results-oddities" / "tables").is_dir():
        for mark, made in ODDITIES.items():
            between("explanation/oddities.md", mark, made())
    front_page(ROOT / "README.md")


if __name__ == "__main__":
    job.run(main)
