"""Recommend recipes for a model within a limit of bits per weight, one list per kind of deployment.
Reads the results of a run; computes no cell."""

import argparse
from collections.abc import Iterator

import pandas as pd

from quantgrid.config import validation
from quantgrid.config.deployments import DEPLOYMENTS, deployment
from quantgrid.config.grid import expand_studies
from quantgrid.config.paths import results_folder
from quantgrid.ground.errors import ConfigError, require_named
from quantgrid.jobs.job import run
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.claims.recommendation import candidates, kinds, limit, read_results, recommend, within
from quantgrid.reporting.claims.recommendation_text import text
from quantgrid.reporting.claims.served import with_servers
from quantgrid.reporting.data import races
from quantgrid.reporting.style import recipe_label


def served(found: pd.DataFrame, content: dict) -> dict[str, str] | None:
    """Map the cells of some recipes to the programs that serve them exactly; None if the config does not
    plan the cells (part of a config is enough to rank them)."""
    try:
        config = validation.check(content)
    except ConfigError:
        return None
    judged = with_servers(found, config, expand_studies(config))
    return dict(zip(judged.cell, judged.served))


def raced(content: dict, model: str) -> Iterator[str]:
    """Sentence of each race of ``model`` that has ended, and its recipes, the cheapest first."""
    try:
        plan = Plan(validation.check(content))
    except ConfigError:  # a part of a config is enough to rank its cells
        return
    for race in (race for own in plan.raced.values() for race in own if race.model == model):
        decision = races.last(plan, race)
        rows = races.cheapest_first(race, decision).to_dict("records")
        labels = [recipe_label(row, plan.config["formats"]) for row in rows]
        yield f"{races.summary(race, decision)} The cheapest first: {'; '.join(labels) or 'none'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configfile", default="config/config.yaml", help="the config whose results are read")
    parser.add_argument("--model", default="", help="name of a model of that config")
    parser.add_argument(
        "--bits",
        default="",
        metavar="N",
        help="at most N stored bits per weight, matrices of online transforms included",
    )
    parser.add_argument("--deployment", default="", metavar="KIND", help=f"one kind: {', '.join(DEPLOYMENTS)}")
    parser.add_argument("--corpus", default="", help="corpus of the divergence, where there are several")
    parser.add_argument("--top", type=int, default=10, help="how many recipes to show of each kind")
    asked = parser.parse_args()
    content, advice = validation.read(asked.configfile), f"`make run CONFIG={asked.configfile}` makes them"
    if known := list(content.get("models") or {}):  # a part of a config may lack them
        require_named("MODEL", asked.model, known)
    records, items = read_results(results_folder(content), advice)
    cells = candidates(records, content.get("formats") or {}, asked.model, asked.corpus)
    bits = limit(asked.bits, cells)
    wanted = [deployment(asked.deployment)] if asked.deployment else kinds(cells)
    fitting = [kind for kind in wanted if len(within(cells, kind, bits))] or wanted[:1]
    for number, kind in enumerate(fitting):
        found = recommend(cells, items, kind, bits)
        title = f"{asked.model}, {kind.title}, at most {bits:g} bits per weight: {len(found)} recipes"
        programs = served(found.head(asked.top), content)
        print("\n" * bool(number) + text(found, title, asked.top, programs))
    for line in raced(content, asked.model):
        print(line)


if __name__ == "__main__":
    run(main)
