"""Evaluate the claims of config/claims.yaml for every model of a run."""

import pandas as pd

from quantgrid.job import arguments, run
from quantgrid.reporting import claims
from quantgrid.reporting.collection import read, write


def main() -> None:
    job = arguments("results", "items", "statements", "claims", several=("items",))
    items = pd.concat([pd.read_parquet(path) for path in job.items]).drop_duplicates(["cell", "metric", "dataset", "item"])
    write(claims.evaluate(claims.read(job.statements), read(job.results), items, job.spec["config"]), job.claims)


if __name__ == "__main__":
    run(main)
