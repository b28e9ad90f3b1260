"""Export one cell to a format that other programs load: `make export`.

    python scripts/export.py --configfile config/config.yaml --model NAME --to TARGET --out FOLDER
        [--cell NAME | --bits N] [--corpus NAME] [--online-rotation] [options of the workflow]

The cell is named as `make recommend` and the report print it, or transform/mitigation/granularity/format.
Without a name it is the best cell that the target can hold. The workflow makes what is missing: a
deleted checkpoint is quantized again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import run_workflow
from quantgrid.config import validation
from quantgrid.config.cells import Cell
from quantgrid.config.exports import Export, cell_name, named_cell, require_exportable
from quantgrid.config.planned_features import planned_verdict
from quantgrid.exports.targets import TARGETS, target_of
from quantgrid.ground.errors import ConfigError, require_named, unknown_name
from quantgrid.jobs.job import run
from quantgrid.plan.pipeline import Plan

SCRIPTS = Path(__file__).resolve().parent


def chosen(plan: Plan, asked: argparse.Namespace, flags: tuple[str, ...]) -> Cell:
    """The cell that is asked for, exportable to the target."""
    own = [cell for cell in plan.cells if cell.model == asked.model]
    quantized = [cell for cell in own if cell.quantized]
    if not quantized:
        others = ", ".join(dict.fromkeys(cell.model for cell in plan.cells if cell.quantized)) or "no model"
        raise ConfigError(f"MODEL: no study of {asked.configfile} quantizes '{asked.model}'; they have {others}")
    if asked.cell:
        cell = labelled(own, asked.cell, plan.config["formats"]) or named_cell(own, asked.cell, "CELL")
        require_exportable(plan.config, cell, asked.to, flags, "CELL")
        return cell
    cell, better = recommended(plan, quantized, asked, flags)
    print(f"{cell_name(cell)}: the best recipe that {asked.to} can hold{f'; {better}' if better else ''}")
    return cell


def recommended(plan: Plan, cells: list[Cell], asked: argparse.Namespace, flags: tuple[str, ...]) -> tuple[Cell, str]:
    """The best recipe that the target can hold, and a line about a better one that it cannot hold.

    :class:`ConfigError` if the target can hold recipes of several kinds of deployment and none is named.
    """
    from quantgrid.config.deployments import deployment
    from quantgrid.reporting.claims import recommendation  # pandas: only to rank
    from quantgrid.reporting.claims.served import best_for

    records, items = recommendation.read_results(plan.results, advice(plan, cells, asked, flags))
    ranked = recommendation.candidates(records, plan.config["formats"], asked.model, asked.corpus)
    wanted = [deployment(asked.deployment)] if asked.deployment else recommendation.kinds(ranked)
    found, refused = {}, ""
    for kind in wanted:
        if len(wanted) == 1 or len(recommendation.within(ranked, kind, asked.bits)):
            ordered = recommendation.recommend(ranked, items, kind, asked.bits)
            try:
                found[kind.name] = best_for(ordered, plan.config, cells, asked.to, flags)
            except ConfigError as error:
                refused = refused or str(error)
    if not found:
        smallest = f"BITS: the smallest recipe of '{asked.model}' has {ranked.bits.min():.4g} stored bits per weight"
        raise ConfigError(refused or smallest)
    if len({cell for cell, _ in found.values()}) > 1:
        names = "; ".join(f"{name} ({cell_name(cell)})" for name, (cell, _) in found.items())
        raise ConfigError(
            f"DEPLOYMENT: {asked.to} can hold recipes of several kinds of deployment: {names}; "
            f"name one, as in DEPLOYMENT={next(iter(found))}, or the cell by CELL"
        )
    return next(iter(found.values()))


def advice(plan: Plan, cells: list[Cell], asked: argparse.Namespace, flags: tuple[str, ...]) -> str:
    """End of the message of missing results: the command that makes them, and the one that needs none,
    with the first of the cells that the target can hold."""
    held = (cell for cell in cells if not planned_verdict(plan.config, cell, asked.to, flags).refusals)
    words = {"CONFIG": asked.configfile, "MODEL": asked.model, "TO": asked.to, "OUT": asked.out}
    words["CELL"] = cell_name(next(held, cells[0]))
    named = " ".join(f"{name}={shlex.quote(str(word))}" for name, word in words.items())
    return f"`make run CONFIG={asked.configfile}` makes them; a named cell needs none: `make export {named}`"


def labelled(cells: list[Cell], name: str, formats: dict) -> Cell | None:
    """The cell whose recipe `make recommend` prints as ``name``, with or without the note of a kept start."""
    from quantgrid.reporting.data.starts import WORDS
    from quantgrid.reporting.style import recipe_label

    label = name.strip().removesuffix(f"({WORDS})").rstrip()
    return next((cell for cell in cells if recipe_label(cell.axes, formats) == label), None)


def make(plan: Plan, export: Export, asked: argparse.Namespace, passed_on: list[str]) -> Path:
    """Run the workflow for one export; the folder in the results."""
    folder = plan.export_model(export).outputs["folder"]
    entry = {"model": export.cell.model, "cell": cell_name(export.cell), "to": export.target, "flags": export.flags}
    own = [] if {"--cores", "-c", "--profile"} & {word.partition("=")[0] for word in passed_on} else ["--cores", "all"]
    words = [folder, "--configfile", asked.configfile, *own, *passed_on, "--quiet", "rules"]
    words += ["--config", f"exports={json.dumps([{**entry, 'name': export.name}])}"]
    if subprocess.run([sys.executable, str(SCRIPTS / "run_workflow.py"), *words]).returncode:
        raise ConfigError(f"{cell_name(export.cell)} was not exported; the messages above name the job and its log")
    return Path(folder)


def place(made: Path, out: Path) -> None:
    """Copy an export to ``out``, which appears when it is complete."""
    from quantgrid.exports.folder import require_disk  # torch

    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        require_disk(out, sum(path.stat().st_size for path in made.rglob("*") if path.is_file()))
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, temporary, ignore=shutil.ignore_patterns(".snakemake_timestamp"))
        os.rename(temporary, out)
    except ConfigError as error:
        raise ConfigError(f"{error}; the export is in {made}") from None
    except OSError as error:
        raise ConfigError(f"OUT: {out} cannot be written ({reason(error)}); the export is in {made}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def reason(error: OSError) -> str:
    """Reason of a failed copy; that of the first file if several failed."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        source, _, text = error.args[0][0]
        return f"{Path(source).name}: {text}"
    return error.strerror or str(error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configfile", default="config/config.yaml")
    parser.add_argument("--model", default="", help="name of a model of that config")
    parser.add_argument("--to", default="", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--out", default="", metavar="FOLDER", help="a new folder")
    parser.add_argument("--cell", default="", help="name of the cell; the best one without it")
    parser.add_argument("--bits", type=float, default=float("inf"), metavar="N", help="at most N bits per weight")
    parser.add_argument(
        "--deployment", default="", metavar="KIND", help="kind of deployment, as make recommend lists them"
    )
    parser.add_argument("--corpus", default="", help="corpus of the divergence, where there are several")
    known_flags = {f"--{flag.replace('_', '-')}": flag for target in TARGETS.values() for flag in target.flags}
    asked, rest = parser.parse_known_args()
    flags = tuple(known_flags[word] for word in rest if word in known_flags)
    plan = Plan(validation.load(asked.configfile))
    for key, word, known in (("MODEL", asked.model, plan.config["models"]), ("TO", asked.to, TARGETS)):
        require_named(key, word, list(known))
    target_of(asked.to)
    out = Path(asked.out).expanduser()
    if not asked.out.strip():
        raise ConfigError(f"OUT: no folder is named; name a new one, as in OUT={asked.model}-{asked.to}")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"OUT: '{asked.out}' exists already; delete it or name a new folder")
    if asked.model not in plan.config["models"]:
        raise ConfigError(f"MODEL: {unknown_name('model', asked.model, plan.config['models'])}")
    export = Export(chosen(plan, asked, flags), asked.to, flags, out.name)
    passed_on = [word for word in rest if word not in known_flags]
    made = make(plan, export, asked, passed_on)
    if run_workflow.asked(run_workflow.DRY | run_workflow.TELLING, passed_on):
        print(f"{out}: not written, because these options run no job: {' '.join(passed_on)}")
        return
    if not made.is_dir():
        raise ConfigError(f"ARGS: with {' '.join(passed_on)} the workflow ends without the export {made}")
    place(made, out)
    print(f"{out}: {cell_name(export.cell)} for {asked.to}; README.md in it says how to load it")


if __name__ == "__main__":
    run(main)
