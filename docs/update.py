"""Bring the results of `make run` into the documents: `make docs`. Every number of the README and of docs/ comes through here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from quantgrid.reporting.costs import read  # noqa: E402 (the library lies beside the scripts, with no install)

RESULTS, DOCS = ROOT / "results", ROOT / "docs"
FIGURES = ("transforms-mitigations", "formats", "transforms-formats", "group-size", "symmetry")
COMMIT = re.compile(r"computed at commit \w+")
MARKED = re.compile(r"<!-- table: (\S+) -->\n(?:.*?<!-- end -->\n)?", re.DOTALL)


def table(study: str) -> str:
    return (RESULTS / "tables" / f"{study}.md").read_text()


def costs() -> str:
    """Seconds and memory per rule, from Snakemake's benchmark files."""
    grouped = pd.DataFrame(read(RESULTS / "benchmarks")).groupby("rule").agg(
        jobs=("seconds", "size"), total=("seconds", "sum"), longest=("seconds", "max"), peak=("max_rss_mb", "max"))
    lines = [f"| {rule} | {row.jobs:.0f} | {row.total:.0f} | {row.longest:.0f} | {row.peak:.0f} |" for rule, row in grouped.iterrows()]
    return "\n".join(["| rule | jobs | seconds, all | seconds, longest | peak RSS, MB |", "| :-- | --: | --: | --: | --: |", *lines, ""])


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    made = f"Made by `make run` and `make docs` on 2 cores, computed at commit {commit}. Tables are those of `results/tables/`."
    parts = ["# The default run", made, ""]
    for study in (name for name in FIGURES if (RESULTS / "tables" / f"{name}.md").is_file()):
        shutil.copy(RESULTS / "figures" / f"{study}.png", DOCS / f"{study}.png")
        parts += [table(study), f"![{study}]({study}.png)", ""]
    parts += ["## What it cost", costs()]
    (DOCS / "default-run.md").write_text("\n".join(parts))
    readme = ROOT / "README.md"
    text = MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{table(found[1])}<!-- end -->\n", readme.read_text())
    readme.write_text(COMMIT.sub(f"computed at commit {commit}", text))


if __name__ == "__main__":
    main()
