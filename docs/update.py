"""Bring the results of `make run` into the documents: `make docs`. Every number of the README and
of docs/ comes through here.

What a job of the workflow left is verified before it is read (`quantgrid.jobs.integrity`): a
damaged file ends the command.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from oddities_tables import TABLES as ODDITIES  # noqa: E402 (the library is in scripts/, not installed)
from reference_cards import TABLES as CARDS  # noqa: E402
from run_costs import costs, fits, solves, spread  # noqa: E402
from wide_tables import split_text  # noqa: E402

from quantgrid.config import validation  # noqa: E402
from quantgrid.jobs import job  # noqa: E402
from quantgrid.jobs.integrity import read_verified, verify  # noqa: E402
from quantgrid.plan.estimates import text as estimate  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.reporting.claims import findings  # noqa: E402
from quantgrid.reporting.figures import distributions, number_lines, pareto, residual_error  # noqa: E402

DOCS = ROOT / "docs"
# Document below docs/ -> title, the config that was run, the command.
RUNS = {
    "runs/default-run": ("The default run", "config/config.yaml", "make run"),
    "runs/formats-run": (
        "Number formats, granularity and symmetry on SmolLM2",
        "config/formats.yaml",
        "make run CONFIG=config/formats.yaml",
    ),
    "runs/transforms-run": (
        "Transforms on SmolLM2",
        "config/transforms.yaml",
        "make run CONFIG=config/transforms.yaml",
    ),
    "runs/mitigations-run": (
        "Mitigations on SmolLM2",
        "config/mitigations.yaml",
        "make run CONFIG=config/mitigations.yaml",
    ),
    "runs/oddities-run": (
        "The oddities of SmolLM2, suspect by suspect",
        "config/oddities.yaml",
        "make run CONFIG=config/oddities.yaml",
    ),
    "runs/studies-run": (
        "Every study, on SmolLM2 and the reference models",
        "config/studies.yaml",
        "make run CONFIG=config/studies.yaml",
    ),
}
# with verdicts on the findings and figures of the whole run
REPORTED = ("runs/studies-run",)
WHOLE = {
    "pareto": pareto.CAPTION,
    "residual-error": residual_error.CAPTION,
    "number-lines": number_lines.CAPTION,
}  # figures of a whole run
DISTRIBUTIONS = (
    "kurtosis-inputs",
    "kurtosis-weights",
    "inputs-attention_input",
    "inputs-down_input",
    "weights-attention_input",
)
# of a picture in the documents: columns of pixels, colours without loss, quality (percent) with loss
WIDTH, COLORS, QUALITY = 1000, 32, 70
COMMIT = re.compile(r"computed at commit \w+")
# Table in the results folder -> the command that makes it.
BENCHMARKS = {"benchmarks": "bench", "benchmarks-plan": "bench-plan", "benchmarks-growth": "bench-growth"}
TEXTS = ("commit", "benchmark", "case", "device", "reference", "reached", "against", "quantity", "grows_faster")
MARKED = re.compile(r"<!-- table: (\S+) -->\n(?:.*?<!-- end -->\n)?", re.DOTALL)


def drawn(image: bytes, name: str) -> str:
    """Save an image as ``name`` below docs/, the smaller of two WebP encodings; return the Markdown
    that shows it in a document of the same folder."""
    with Image.open(io.BytesIO(image)) as full:
        shown = full.convert("RGB")
    if shown.width > WIDTH:
        shown = shown.resize((WIDTH, shown.height * WIDTH // shown.width), Image.Resampling.LANCZOS)
    lossy, lossless = io.BytesIO(), io.BytesIO()
    shown.save(lossy, "WEBP", quality=QUALITY)
    shown.quantize(COLORS, dither=Image.Dither.NONE).convert("RGB").save(lossless, "WEBP", lossless=True)
    target = DOCS / f"{name}.webp"
    target.write_bytes(min(lossy.getvalue(), lossless.getvalue(), key=len))
    return f"![{target.stem}]({target.name})\n"


def picture(source: Path, name: str) -> str:
    """Save a figure of a results folder next to the documents; return the Markdown that shows it."""
    return drawn(read_verified(source), name)


def trainings(results: Path, run: str) -> str:
    """Losses of trainings, and some of the figures of inputs and weights before rounding; nothing
    if none. Of several models two figures each."""
    parts = [picture(path, f"{run}-learning") for path in [results / "learning.png"] if path.is_file()]
    models = sorted(path for path in (results / "distributions").glob("*") if path.is_dir())
    chosen = DISTRIBUTIONS if len(models) == 1 else ("kurtosis-inputs", "inputs-down_input")
    for folder in models:
        for name in chosen:
            if (path := folder / f"{name}.png").is_file():
                label = f"{run}-{name}" if len(models) == 1 else f"{run}-{folder.name}-{name}"
                parts += [f"{folder.name}: {distributions.caption(name)}\n", picture(path, label)]
    return "\n".join(["## Trainings, and inputs and weights before rounding", *parts, ""]) if parts else ""


def claims(results: Path) -> str:
    """The findings with their verdicts, a column for each model: how many comparisons hold, and
    what speaks least for it."""
    verify(results / "claims.csv")
    found = findings.judged(findings.read(results / "claims.csv"))
    models = findings.models(found)
    lines = [f"| finding | in the paper | {' | '.join(models)} |", f"| {' | '.join([':--'] * (2 + len(models)))} |"]
    for claim in found:
        lines.append(
            f"| {claim['statement']} | {claim['paper']} | "
            f"{' | '.join(verdict(claim['verdicts'].get(model)) for model in models)} |"
        )
    note = (
        "Below a verdict: how many comparisons hold, and the change of perplexity in the one that speaks least for "
        "the claim, with its 95 % "
        "interval. Paired by window, adjusted by Holm over all comparisons of a model. The report lists all "
        "comparisons with their cells."
    )
    total = ", ".join(f"{name} {count}" for name, count in findings.counts(found).items())
    return "\n".join(
        [
            "## Findings",
            f"`config/claims.yaml` states them; verdicts, over all models: {total}.",
            "",
            *lines,
            "",
            note,
            "",
        ]
    )


def verdict(given: dict | None) -> str:
    if given is None:
        return "–"
    if given["weakest"] is None:
        return given["verdict"]
    against = f" against {given['against']}" if given["against"] else ""
    starts = f", {given['start_kept']} with a start kept" if given["start_kept"] else ""
    held = f"{given['counts']['holds']} of {given['tested']} hold{against}{starts}"
    return f"**{given['sign']} {given['verdict']}**<br>{held}<br>{given['weakest']['shown']}"


def document(name: str, commit: str) -> None:
    """Findings, tables and figures of one run's results, study by study, and what they cost;
    nothing where the run was not made."""
    title, config, command = RUNS[name]
    content = yaml.safe_load((ROOT / config).read_text())
    results = ROOT / content["results_dir"]
    if not (results / "tables").is_dir():
        return
    run = name.removesuffix("-run")
    parts = [f"# {title}", f"Made by `{command}` and `make docs` on 2 cores, computed at commit {commit}.", ""]
    parts += [claims(results)] if name in REPORTED else []
    for study, spec in content["studies"].items():
        compared, table = (
            results / "comparisons" / f"{study}.md",
            read_verified(results / "tables" / f"{study}.md").decode(),
        )
        if name in REPORTED:  # a headline instead of the title that the table has
            source = [f"In the paper: {spec['paper']}."] if "paper" in spec else []
            table = "\n\n".join(
                [
                    f"## {spec['title']}",
                    *source,
                    *([spec["description"]] if "description" in spec else []),
                    table.partition("\n\n")[2],
                ]
            )
        parts += [table, read_verified(compared).decode() if compared.is_file() else ""]
        parts.append(picture(results / "figures" / f"{study}.png", f"{run}-{study}"))
    for figure, caption in WHOLE.items() if name in REPORTED else ():
        if (results / f"{figure}.png").is_file():
            parts += [
                f"## {figure.replace('-', ' ').capitalize()}\n",
                f"{caption}\n",
                picture(results / f"{figure}.png", f"{run}-{figure}"),
            ]
    parts.append(trainings(results, run) + spread(results) + fits(results) + solves(results) + costs(results))
    (DOCS / f"{name}.md").write_text(split_text("\n".join(parts)))


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
    table = ROOT / "results" / f"{name}.csv"
    if not table.is_file():
        return
    found = pd.read_csv(table, dtype=str, keep_default_na=False)
    found = found.loc[:, (found != "").any()].drop(columns="repeats", errors="ignore")
    head = [[column.replace("_", " ") for column in found], [":--" if column in TEXTS else "--:" for column in found]]
    at = "each row at its commit" if "commit" in found else f"computed at commit {commit}"
    made = f"By `make {BENCHMARKS[name]}` and `make docs` on 2 cores of an x86-64 processor, {at}."
    text = [made, "", *(f"| {' | '.join(row)} |" for row in [*head, *found.values.tolist()])]
    if table.with_suffix(".png").is_file():
        text += ["", drawn(table.with_suffix(".png").read_bytes(), f"explanation/{name}").rstrip()]
    between("explanation/performance.md", name, "\n".join(text))


def front_page(tables: Path, readme: Path, commit: str) -> None:
    """Put tables of the default run into the README between their marks; nothing where that run was
    not made."""
    if not tables.is_dir():
        return

    def table(found: re.Match) -> str:
        return f"<!-- table: {found[1]} -->\n{read_verified(tables / f'{found[1]}.md').decode()}<!-- end -->\n"

    readme.write_text(COMMIT.sub(f"computed at commit {commit}", MARKED.sub(table, readme.read_text())))


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    for name in RUNS:
        document(name, commit)
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
    for mark, table in CARDS.items():
        between("explanation/reference-models.md", mark, table(ROOT / "models"))
    if (ROOT / "results-oddities" / "tables").is_dir():
        for mark, table in ODDITIES.items():
            between("explanation/oddities.md", mark, table())
    front_page(ROOT / "results" / "tables", ROOT / "README.md", commit)


if __name__ == "__main__":
    job.run(main)
