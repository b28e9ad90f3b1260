"""Recommend a recipe for a model within a limit of bits per weight. Reads the results of a run;
computes no cell."""

import argparse
from pathlib import Path

import pandas as pd

from quantgrid.config import validation
from quantgrid.config.paths import results_folder
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.integrity import verify
from quantgrid.jobs.job import run
from quantgrid.reporting.claims.recommendation import recommend, text
from quantgrid.reporting.data.collection import read


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
    folder = Path(results_folder(validation.read(asked.configfile)))
    results, items = folder / "results.csv", sorted(folder.glob("studies/*.items.parquet"))
    if not results.is_file() or not items:
        raise ConfigError(f"{folder}: no results yet; `make run CONFIG={asked.configfile}` makes them")
    for path in (results, *items):
        verify(path)
    windows = pd.concat([pd.read_parquet(path) for path in items]).drop_duplicates(
        ["cell", "metric", "dataset", "item"]
    )
    found = recommend(read(results), windows, asked.model, asked.bits, asked.corpus)
    print(text(found, f"{asked.model}, at most {asked.bits:g} bits per weight: {len(found)} recipes", asked.top))


if __name__ == "__main__":
    run(main)
