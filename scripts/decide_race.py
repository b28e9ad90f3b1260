"""Decide on one look of a race: compare its candidates on all windows up to this look; or, before
the first look, decide by the errors of some candidates which of the others are raced.

Reads the decision before it and the shards of the candidates that are still in the race, whose
paths follow from the plan: their list can exceed the length of a command line.
"""

import math
from typing import Any

from quantgrid.config.races import is_within
from quantgrid.evaluation.races import Conditions, decide, prune
from quantgrid.ground.documents import parse_json
from quantgrid.ground.storage import read_json, write_json
from quantgrid.jobs.integrity import read_verified
from quantgrid.jobs.job import arguments, record, run
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.race_steps import PRUNING, Race


def start(race: Race) -> dict[str, Any]:
    """Content of a decision before anything is decided."""
    names = [cell.path for cell in race.candidates]
    nothing: dict[str, Any] = {"looks": [], "losses": {}, "bits": {}, "failed": {}, "pruned": {}}
    return {**nothing, "corpus": None, "survivors": names, "ended": ""}


def pruned(plan: Plan, race: Race, before: dict[str, Any], place: str) -> dict[str, Any]:
    """Content of the decision on pruning; a predictor that failed, or has more bits than the race
    allows, predicts nothing: what it stands for is raced."""
    cells = race.named(dict.fromkeys(race.predictors.values()))
    measured = {cell.path: read(place + plan.measured(race, cell)) for cell in cells}
    errors = {
        name: _error(found)
        for name, found in measured.items()
        if found["status"] == "ok" and is_within(found["summary"]["stored_bits"], race.settings["budget"])
    }
    predicted = {name: errors[other] for name, other in race.predictors.items() if other in errors}
    out = prune(predicted, race.settings["prune"])
    return {**before, "pruned": out, "survivors": [name for name in before["survivors"] if name not in out]}


def _error(measured: dict[str, Any]) -> float:
    """Sum of the relative errors of all linears, their inputs rounded too."""
    return math.fsum(linear.get("joint_output_error", 0.0) for linear in measured["linears"].values())


def look(plan: Plan, race: Race, number: int, before: dict[str, Any], place: str) -> dict[str, Any]:
    """Content of the decision of a look: that of the decision ``before``, with this look added."""
    cells = race.named(before["survivors"])
    losses, bits, broken = dict(before["losses"]), dict(before["bits"]), dict(before["failed"])
    corpus, failed = before["corpus"], {}
    for cell in cells:
        found = read(place + plan.look(race, cell, number).outputs["result"])
        if number == 0:
            measured = read(place + plan.measured(race, cell))
            bits[cell.path] = measured.get("summary", {})
        stored = bits[cell.path].get("stored_bits", 0.0)
        if found["status"] != "ok":
            failed[cell.path] = broken[cell.path] = found["reason"]
        elif not is_within(stored, race.settings["budget"]):
            reason = f"{stored:.4g} stored bits per weight, the budget is {race.settings['budget']:g}"
            failed[cell.path] = broken[cell.path] = reason
        else:
            losses[cell.path] = [*losses.get(cell.path, []), *found["windows"][race.settings["metric"]]]
            corpus = corpus or {"corpus": found["corpus"], "dtype": found["dtype"]}
    racing = {cell.path: losses[cell.path] for cell in cells if cell.path not in failed}
    decision = decide(racing, failed, Conditions(**race.conditions))
    return {
        "pruned": before["pruned"],
        "looks": [*before["looks"], decision.to_dict()],
        "losses": losses,
        "bits": bits,
        "failed": broken,
        "corpus": corpus,
        "survivors": list(decision.survivors),
        "ended": decision.ended,
    }


def read(path: str) -> dict[str, Any]:
    return parse_json(read_verified(path), path)


def main() -> None:
    job = arguments("previous", "decision", optional=("previous",))
    plan = Plan(job.spec["config"])
    axes = job.spec["axes"]
    race, number = plan.race(axes["study"], axes["model"]), int(axes["look"]) - 1
    # Snakemake may store results in another place than the config names.
    place = job.decision.removesuffix(plan.decide_race(race, number).outputs["decision"])
    before = read_json(job.previous) if job.previous else start(race)
    found = pruned(plan, race, before, place) if number == PRUNING else look(plan, race, number, before, place)
    write_json(job.decision, {**record(job.spec), "race": job.spec["race"], "status": "ok", **found})


if __name__ == "__main__":
    run(main)
