"""Find the best recipe of a model within a budget of stored bits per weight: `make best`.

    python scripts/best.py --model FOLDER_OR_NAME --bits N --kind w4a16|w4a4 [--configfile CONFIG]
        [--to TARGET] [--space config/best.yaml] [options of the workflow]

Races the recipes of the space with weights and activations of these bits, those that the export target
holds if one is named, evaluates those that the race does not tell apart on other windows, and names the
cheapest of them, the page of the race and the command that exports it. The model is a folder, or an
entry of CONFIG. An interrupted run goes on where it was.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from quantgrid.config import validation
from quantgrid.config.cell_checks import check_cell
from quantgrid.config.cells import Cell
from quantgrid.config.exports import cell_name
from quantgrid.config.grid import product_cells
from quantgrid.config.planned_features import planned_verdict
from quantgrid.exports.targets import TARGETS, target_of
from quantgrid.ground.errors import ConfigError, unknown_name
from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import run
from quantgrid.plan.pipeline import Plan

SCRIPTS = Path(__file__).resolve().parent


def model_entry(asked: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name and config entry of the model: a folder, or an entry of the config file."""
    if Path(asked.model).is_dir():
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(asked.model).resolve().name).strip("-._") or "model"
        return name, {"source": "local", "path": asked.model}
    models = validation.read(asked.configfile).get("models", {})
    if asked.model not in models:
        raise ConfigError(f"MODEL: no folder of this name, and {unknown_name('model', asked.model, models)}")
    return asked.model, models[asked.model]


def config_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Config of the race: the space, its model, its budget, without recipes that do not fit the model or
    that the export target cannot hold."""
    space, (name, entry) = validation.read(asked.space), model_entry(asked)
    if asked.kind not in space["studies"]:
        raise ConfigError(f"KIND: {unknown_name('kind', asked.kind, space['studies'])}")
    study = deepcopy(space["studies"][asked.kind]) | {"models": [name]}
    study["race"] = {**study["race"], "budget": asked.bits}
    config = {**space, "models": {name: entry}, "studies": {asked.kind: study}}
    config["results_dir"] = str(Path(space["results_dir"], "-".join(filter(None, (name, asked.kind, asked.to)))))
    unfit = dict(misfits(config, study, asked.to))
    place, first = f"{name} in {asked.to}" if asked.to else name, next(iter(unfit.values()), "")
    if len(unfit) == len([*product_cells(config, study, "space")]):
        raise ConfigError(f"no {asked.kind} recipe fits {place}, the first because: {first}")
    study["exclude"] = [
        *study.get("exclude", []),
        *({axis: value for axis, value in cell.axes.items() if axis != "model"} for cell in unfit),
    ]
    if unfit:
        print(f"{len(unfit)} recipes do not fit {place}, the first of them because: {first}")
    return config


def misfits(config: dict[str, Any], study: dict[str, Any], to: str | None) -> Iterator[tuple[Cell, str]]:
    """Cells of the study that its model cannot take or the export target ``to`` cannot hold, with the reason."""
    for cell in product_cells(config, study, "space"):
        try:
            check_cell(config, cell, "space")
        except ConfigError as error:
            yield cell, str(error)
            continue
        refusals = planned_verdict(config, cell, to).refusals if to else ()
        if refusals:
            yield cell, refusals[0]


def workflow(config: Path, passed_on: list[str]) -> None:
    own = [] if {"--cores", "-c", "--profile"} & {word.partition("=")[0] for word in passed_on} else ["--cores", "all"]
    words = [sys.executable, str(SCRIPTS / "run_workflow.py"), "--configfile", str(config), *own, *passed_on]
    if subprocess.run(words).returncode:
        raise ConfigError("the race did not end; the messages above name the job and its log; run it again to go on")


def export_line(plan: Plan, cell: Cell, config: Path, to: str | None) -> str:
    """Command that exports a recipe to ``to``, or else to the first target that does not refuse it."""
    held = (target for target in TARGETS if not planned_verdict(plan.config, cell, target).refusals)
    target = to or next(held, None)
    if target is None:
        return (
            f"no export target holds {cell_name(cell)}; run again with TO=NAME ({', '.join(TARGETS)}) to race only the "
            "recipes that a target holds"
        )
    words = {"CONFIG": config, "MODEL": cell.model, "CELL": cell_name(cell), "TO": target, "OUT": "exported"}
    return "make export " + " ".join(f"{name}={shlex.quote(str(word))}" for name, word in words.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, or an entry of the config")
    parser.add_argument("--bits", required=True, type=float, metavar="N", help="stored bits per weight at most")
    parser.add_argument("--kind", required=True, help="bits of weights and activations")
    parser.add_argument("--to", help="export target that has to hold the recipes; without it all recipes race")
    parser.add_argument("--configfile", default="config/config.yaml", help="config with the entry of the model")
    parser.add_argument("--space", default="config/best.yaml", help="config with a study per deployment kind")
    asked, passed_on = parser.parse_known_args()
    if asked.to:
        target_of(asked.to)
    content = config_of(asked)
    file = Path(content["results_dir"], "config.yaml")
    plan = Plan(validation.check(content))
    write_text(file, yaml.safe_dump(content, sort_keys=False))
    [race] = plan.raced[asked.kind]
    print(f"{len(race.candidates)} recipes of {race.model} within {asked.bits:g} stored bits per weight are raced")
    workflow(file, passed_on)
    if {"-n", "--dry-run", "--dryrun"} & set(passed_on):
        return
    from quantgrid.reporting.data import races  # pandas: only to rank
    from quantgrid.reporting.style import recipe_label

    decision = races.last(plan, race)
    found = races.cheapest_first(race, decision)
    print(races.summary(race, decision))
    for row in found.to_dict("records"):
        label = recipe_label(row, plan.config["formats"])
        print(f"  {label}: {row['bits']:.3f} bits, {row['operations']:.4g} online operations per token")
    if found.empty:
        raise ConfigError(f"BITS: no recipe stays within {asked.bits:g} bits once it is quantized; allow more bits")
    [best] = race.named(found.cell.head(1))
    print(f"the page of the race: {content['results_dir']}/report.html")
    print(f"the cheapest of them: {export_line(plan, best, file, asked.to)}")


if __name__ == "__main__":
    run(main)
