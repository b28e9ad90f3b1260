"""Bring the results of `make run` into the documents: `make docs`. Every number of the README and of docs/ comes through here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from quantgrid.reporting.costs import read  # noqa: E402 (the library lies beside the scripts, with no install)

DOCS = ROOT / "docs"
# Document -> title, the config that was run, the command.
RUNS = {
    "default-run": ("The default run", "config/config.yaml", "make run"),
    "formats-run": ("Number formats, granularity and symmetry on SmolLM2", "config/formats.yaml", "make run CONFIG=config/formats.yaml"),
    "transforms-run": ("Transforms on SmolLM2", "config/transforms.yaml", "make run CONFIG=config/transforms.yaml"),
    "mitigations-run": ("Mitigations on SmolLM2", "config/mitigations.yaml", "make run CONFIG=config/mitigations.yaml"),
}
SEED = r"-s\d+$"  # what a name with several seeds ends in
DISTRIBUTIONS = ("kurtosis-inputs", "kurtosis-weights", "inputs-attention_input", "inputs-down_input", "weights-attention_input")
COMMIT = re.compile(r"computed at commit \w+")
MEASURED = re.compile(r"<!-- benchmarks -->\n.*?<!-- end -->\n", re.DOTALL)
SHOWN = {"case": ":--", "threads": "--:", "milliseconds": "--:", "peak_mb": "--:", "reference": ":--", "reference_milliseconds": "--:",
         "reference_peak_mb": "--:", "ratio": "--:", "goal": "--:", "reached": ":--"}
MARKED = re.compile(r"<!-- table: (\S+) -->\n(?:.*?<!-- end -->\n)?", re.DOTALL)


def costs(results: Path) -> str:
    """Seconds and memory per rule, from Snakemake's benchmark files."""
    grouped = pd.DataFrame(read(results / "benchmarks")).groupby("rule").agg(
        jobs=("seconds", "size"), total=("seconds", "sum"), longest=("seconds", "max"), peak=("max_rss_mb", "max"))
    lines = [f"| {rule} | {row.jobs:.0f} | {row.total:.0f} | {row.longest:.0f} | {row.peak:.0f} |" for rule, row in grouped.iterrows()]
    return "\n".join(["| rule | jobs | seconds, all | seconds, longest | peak RSS, MB |", "| :-- | --: | --: | --: | --: |", *lines, ""])


def fits(results: Path) -> str:
    """Wall time of fitting each transform and the size of its parameters; of several seeds the mean. Nothing where all took less than a second."""
    found = pd.DataFrame([entry for entry in read(results / "benchmarks") if entry["rule"] == "fit_transform"])
    found[["model", "transform", "fitted to", "key"]] = found.name.str.split("/", expand=True)
    if found.seconds.max() < 1:
        return ""
    files = [results / "transforms" / name / "transform.safetensors" for name in found.name]
    found["megabytes"] = [path.stat().st_size / 1e6 if path.is_file() else float("nan") for path in files]
    found["transform"] = found["transform"].str.replace(SEED, "", regex=True)
    grouped = found.groupby(["transform", "fitted to"]).agg(jobs=("seconds", "size"), seconds=("seconds", "mean"), peak=("max_rss_mb", "max"),
                                                            megabytes=("megabytes", "mean"))
    lines = [f"| {transform} | {target} | {row.jobs:.0f} | {row.seconds:.3g} | {row.peak:.0f} | {row.megabytes:.3g} |"
             for (transform, target), row in grouped.iterrows()]
    head = "| transform | fitted to | seeds | seconds, mean | peak RSS, MB | file, MB |"
    return "\n".join(["## Fitting the transforms", head, "| :-- | :-- | --: | --: | --: | --: |", *lines, "", ""])


def solves(results: Path) -> str:
    """Wall time and memory of quantizing the whole model by each mitigation, over transforms and formats, import and checkpoint included."""
    found = pd.DataFrame([entry for entry in read(results / "benchmarks") if entry["rule"] in ("quantize_model", "train_model")])
    found[["model", "transform", "mitigation", "granularity", "format", "key"]] = found.name.str.split("/", expand=True)
    grouped = found[found.mitigation != "none"].groupby("mitigation").agg(jobs=("seconds", "size"), mean=("seconds", "mean"), low=("seconds", "min"),
                                                                        high=("seconds", "max"), peak=("max_rss_mb", "max"))
    lines = [f"| {mitigation} | {row.jobs:.0f} | {row['mean']:.0f} | {row.low:.0f} to {row.high:.0f} | {row.peak:.0f} |"
             for mitigation, row in grouped.sort_values("mean").iterrows()]
    head = "| mitigation | jobs | seconds, mean | range | peak RSS, MB |"
    return "\n".join(["## Quantizing the model", head, "| :-- | --: | --: | --: | --: |", *lines, "", ""])


def spread(results: Path) -> str:
    """Perplexity and KL divergence of names with several seeds: mean, standard deviation over seeds, range; nothing where there are none."""
    found = pd.read_csv(results / "results.csv", keep_default_na=False)
    found = found[found.metric.isin(["perplexity", "kl_divergence"]) & found["transform"].str.contains(SEED) & (found.status == "ok")]
    if found.empty:
        return ""
    found = found.assign(name=found["transform"].str.replace(SEED, "", regex=True), value=pd.to_numeric(found.value))
    grouped = found.groupby(["name", "mitigation", "granularity", "format", "metric"], sort=False).value
    lines = [f"| {' | '.join(key)} | {of.size} | {of.mean():.4g} | {of.std():.2g} | {of.min():.4g} to {of.max():.4g} |" for key, of in grouped]
    head = "| transform | mitigation | granularity | format | metric | seeds | mean | standard deviation over seeds | range |"
    return "\n".join(["## Spread over seeds", head, "| :-- | :-- | :-- | :-- | :-- | --: | --: | --: | --: |", *lines, "", ""])


def pictures(results: Path, run: str) -> str:
    """Losses of trainings, and some of the figures of inputs and weights before rounding, copied beside the document; nothing if none."""
    shown = [results / "learning.png", *(path for name in DISTRIBUTIONS for path in sorted(results.glob(f"distributions/*/{name}.png")))]
    parts = []
    for path in shown:
        if path.is_file():
            shutil.copy(path, DOCS / f"{run}-{path.name}")
            parts.append(f"![{path.stem}]({run}-{path.name})\n")
    return "\n".join(["## Trainings, and inputs and weights before rounding", *parts, ""]) if parts else ""


def document(name: str, commit: str) -> None:
    """Tables and figures of one run's results, study by study, and what they cost; nothing where the run was not made."""
    title, config, command = RUNS[name]
    content = yaml.safe_load((ROOT / config).read_text())
    results = ROOT / content["results_dir"]
    if not (results / "tables").is_dir():
        return
    parts = [f"# {title}", f"Made by `{command}` and `make docs` on 2 cores, computed at commit {commit}.", ""]
    run = name.removesuffix("-run")
    for study in content["studies"]:
        picture = f"{run}-{study}.png"
        shutil.copy(results / "figures" / f"{study}.png", DOCS / picture)
        compared = results / "comparisons" / f"{study}.md"
        parts += [(results / "tables" / f"{study}.md").read_text(), compared.read_text() if compared.is_file() else "", f"![{study}]({picture})", ""]
    parts.append(pictures(results, run) + spread(results) + fits(results) + solves(results) + "## What it cost")
    (DOCS / f"{name}.md").write_text("\n".join([*parts, costs(results)]))


def benchmarks(commit: str) -> None:
    """What `make bench` left in the results folder, into performance.md; nothing where it was not run."""
    table, page = ROOT / "results" / "benchmarks.csv", DOCS / "performance.md"
    if not table.is_file():
        return
    found = pd.read_csv(table, dtype=str, keep_default_na=False)[list(SHOWN)]
    lines = [f"| {' | '.join(row)} |" for row in [[name.replace("_", " ") for name in SHOWN], list(SHOWN.values()), *found.values.tolist()]]
    text = f"<!-- benchmarks -->\nBy `make bench` and `make docs` on 2 cores of an x86-64 processor, computed at commit {commit}.\n\n"
    page.write_text(MEASURED.sub(lambda _: text + "\n".join(lines) + "\n<!-- end -->\n", page.read_text()))


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    for name in RUNS:
        document(name, commit)
    benchmarks(commit)
    tables, readme = ROOT / "results" / "tables", ROOT / "README.md"
    if tables.is_dir():
        text = MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{(tables / f'{found[1]}.md').read_text()}<!-- end -->\n", readme.read_text())
        readme.write_text(COMMIT.sub(f"computed at commit {commit}", text))


if __name__ == "__main__":
    main()
