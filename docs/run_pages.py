"""Pages of runs, from the records and pictures that the repository keeps of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import yaml
from pictures import DOCS, drawn, shown
from run_costs import costs, fits, solves, spread
from run_files import keep, kept
from wide_tables import split_text

from quantgrid.ground.places import ROOT
from quantgrid.jobs.integrity import read_verified
from quantgrid.reporting.data.collection import merge
from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.figures import distributions, number_lines, pareto, residual_error
from quantgrid.reporting.figures.study_figures import plot, save
from quantgrid.reporting.tables import comparisons, study_tables, writers

# Document below docs/ -> title, the config that was run, the command.
RUNS = {
    "runs/default-run": ("The default run", "config/config.yaml", "make run"),
    "runs/oddities-run": (
        "The oddities of SmolLM2, suspect by suspect",
        "config/oddities.yaml",
        "make run CONFIG=config/oddities.yaml",
    ),
    "runs/contradictions-run": (
        "Findings that a model contradicts, cause by cause",
        "config/contradictions.yaml",
        "make run CONFIG=config/contradictions.yaml",
    ),
    "runs/methods-2026-run": (
        "Methods of 2025 and 2026",
        "config/methods-2026.yaml",
        "make run CONFIG=config/methods-2026.yaml",
    ),
    "runs/studies-run": (
        "Every study, on SmolLM2 and the reference models",
        "config/studies.yaml",
        "make table STUDY=... CONFIG=config/studies.yaml",
    ),
}
# with the losses of every window, for the verdicts of docs/evidence.md
REPORTED = ("runs/studies-run",)
# where the conclusions of a run stand
CONCLUSIONS = {
    "runs/studies-run": "[The evidence](../evidence.md) has the verdicts on the findings of the paper.",
    "runs/oddities-run": "[Anomalies of SmolLM2-135M](../explanation/oddities.md) has the causes.",
    "runs/contradictions-run": "[The evidence](../evidence.md#contradictions) says what follows.",
    "runs/methods-2026-run": "[Results](index.md) says what it shows so far.",
}
# with the figure of divergence against bits
FRONTS = ("runs/default-run",)
CAPTIONS = {"residual-error": residual_error.CAPTION, "number-lines": number_lines.CAPTION}
# figures of a whole run
WHOLE = {"runs/studies-run": tuple(CAPTIONS), "runs/oddities-run": ("residual-error",)}
DISTRIBUTIONS = (
    "kurtosis-inputs",
    "kurtosis-weights",
    "trace-excess",
    "inputs-attention_input",
    "inputs-down_input",
    "weights-attention_input",
)
FEW = ("kurtosis-inputs", "inputs-down_input")  # of several models
ALONE = {"runs/methods-2026": {"reference-4m-planted": ("trace-excess",)}}  # of each model, if not these


def archive(name: str) -> Path:
    """Kept records of the run of a document."""
    return DOCS / f"{name.removesuffix('-run')}.tar.xz"


def keep_run(name: str, commit: str) -> None:
    """Keep the records and pictures of one run; nothing where its results folder is not there."""
    content = yaml.safe_load((ROOT / RUNS[name][1]).read_text())
    results = ROOT / content["results_dir"]
    if (results / "studies").is_dir():
        keep(results, archive(name), content, commit, name in REPORTED)
        keep_pictures(results, name.removesuffix("-run"), WHOLE.get(name, ()))


def keep_pictures(results: Path, run: str, whole: tuple[str, ...]) -> None:
    """Keep the figures of a results folder that need more than its records: those named in ``whole``,
    losses of trainings, and some of the inputs and weights before rounding."""
    wanted = {f"{run}-{name}": results / f"{name}.png" for name in (*whole, "learning")}
    models = sorted(path for path in (results / "distributions").glob("*") if path.is_dir())
    for folder in models:
        usual = DISTRIBUTIONS if len(models) == 1 else FEW
        for name in ALONE[run].get(folder.name, ()) if run in ALONE else usual:
            wanted[f"{run}-{folder.name}-{name}"] = folder / f"{name}.png"
    for name, path in wanted.items():
        if path.is_file():
            drawn(read_verified(path), name)


def trainings(run: str, models: list[str]) -> str:
    """Losses of trainings, and some of the figures of inputs and weights before rounding; nothing
    if none."""
    parts = [shown(f"{run}-learning")]
    for model in models:
        for name in DISTRIBUTIONS:
            if picture := shown(f"{run}-{model}-{name}"):
                parts += [f"{model}: {distributions.caption(name)}\n", picture]
    parts = list(filter(None, parts))
    return "\n".join(["## Trainings, and inputs and weights before rounding", *parts, ""]) if parts else ""


def compared(folder: Path, spec: dict) -> str:
    """Paired comparisons of one study as a table; empty if it has none."""
    path = folder / "comparisons" / f"{spec['study']}.csv"
    found = pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame()
    return "" if found.empty else writers.markdown(comparisons.table(found, spec))


def table(folder: Path, spec: dict) -> str:
    """Results of one study as a table."""
    return writers.markdown(study_tables.build(read_records(folder / "studies" / f"{spec['study']}.csv"), spec))


def figure(folder: Path, spec: dict, name: str) -> str:
    """Draw the figure of one study next to the documents; return the Markdown that shows it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.png"
        save(plot(read_records(folder / "studies" / f"{spec['study']}.csv"), spec), [path])
        return drawn(path.read_bytes(), name)


def front(folder: Path, about: dict, name: str) -> str:
    """Draw divergence against bits of all cells of a run next to its document; return headline, caption and
    the Markdown that shows it."""
    records = merge([read_records(folder / "studies" / f"{study}.csv") for study in about["studies"]])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.png"
        save(pareto.plot(pareto.points(records, about["formats"])), [path])
        shown_figure = drawn(path.read_bytes(), f"{name.removesuffix('-run')}-pareto")
    return "\n".join(["## Divergence and bits", pareto.CAPTION, "", shown_figure])


def document(name: str) -> None:
    """Write tables and figures of one kept run, study by study, and what they cost; nothing
    where none is kept."""
    title, _, command = RUNS[name]
    if not archive(name).is_file():
        return
    run = name.removesuffix("-run")
    with kept(archive(name)) as (folder, about):
        commits = sorted({*about["commits"].values()})
        made = f"Made by `{command}` and `make docs` on 2 cores, "
        made += (
            f"computed at commit {commits[0]}." if len(commits) == 1 else "each study at the commit below its table."
        )
        if about["missing"]:
            made += f" Not computed yet: {', '.join(about['missing'])}."
        parts = [f"# {title}", made, ""]
        parts += [CONCLUSIONS[name], ""] if name in CONCLUSIONS else []
        for study, fields in about["studies"].items():
            spec = {**fields, "study": study}
            source = [f"In the paper: {spec['paper']}."] if "paper" in spec else []
            described = [spec["description"]] if "description" in spec else []
            text = table(folder, spec).partition("\n\n")[2]  # a headline instead of the title that the table has
            text = "\n\n".join([f"## {spec['title']}", *source, *described, text])
            if len(commits) > 1:
                text += f"\nComputed at commit {about['commits'][study]}.\n"
            parts += [text, compared(folder, spec), figure(folder, spec, f"{run}-{study}")]
        parts += [front(folder, about, name)] if name in FRONTS else []
        for whole in WHOLE.get(name, ()):
            if picture := shown(f"{run}-{whole}"):
                parts += [f"## {whole.replace('-', ' ').capitalize()}\n", f"{CAPTIONS[whole]}\n", picture]
        parts.append(trainings(run, about["models"]))
        parts.append(spread(folder) + fits(folder) + solves(folder) + costs(folder))
    (DOCS / f"{name}.md").write_text(split_text("\n".join(parts)))
