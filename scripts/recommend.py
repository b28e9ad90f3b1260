"""Recommend a recipe for a model within a limit of bits per weight. Reads the results of a run;
computes no cell."""

import argparse
from collections.abc import Iterator

import pandas as pd

from quantgrid.config import validation
from quantgrid.config.grid import expand_studies
from quantgrid.config.paths import results_folder
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.job import run
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.claims.recommendation import recommended, text
from quantgrid.reporting.claims.served import with_servers
from quantgrid.reporting.data import races
from quantgrid.reporting.style import recipe_label


def judged(found: pd.DataFrame, content: dict) -> pd.DataFrame:
    """``found`` with the programs that serve each recipe exactly; as it is if the config does not plan
    the cells (part of a config is enough to rank them)."""
    try:
        config = validation.check(content)
    except ConfigError:
        return found
    return with_servers(found, config, expand_studies(config))


def raced(content: dict, model: str) -> Iterator[str]:
    """Sentence of each race of ``model`` that has ended, and its recipes, the cheapest first."""
    try:
        plan = Plan(validation.check(content))
    except ConfigError:  # a part of a config is enough to rank its cells
        return
    for race in (race for own in plan.raced.values() for race in own if race.model == model):
        decision = races.last(plan, race)
        labels = [
            recipe_label(row["transform"], row["mitigation"], row["granularity"], row["format"])
            for row in races.cheapest_first(race, decision).to_dict("records")
        ]
        yield f"{races.summary(race, decision)} The cheapest first: {'; '.join(labels) or 'none'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configfile", default="config/config.yaml", help="the config whose results are read")
    parser.add_argument("--model", required=True, help="name of a model of that config")
    parser.add_argument(
        "--bits",
        required=True,
        type=float,
        metavar="N",
        help="at most N stored bits per weight, matrices of online transforms included",
    )
    parser.add_argument("--corpus", default="", help="corpus of the perplexity, where there are several")
    parser.add_argument("--top", type=int, default=20, help="how many recipes to show")
    asked = parser.parse_args()
    content, advice = validation.read(asked.configfile), f"`make run CONFIG={asked.configfile}` makes them"
    found = recommended(results_folder(content), asked.model, asked.bits, asked.corpus, advice)
    title = f"{asked.model}, at most {asked.bits:g} bits per weight: {len(found)} recipes"
    print(text(judged(found.head(asked.top), content) if asked.top else found, title, asked.top))
    for line in raced(content, asked.model):
        print(line)


if __name__ == "__main__":
    run(main)
