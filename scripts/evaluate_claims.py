"""Evaluate the claims of config/claims.yaml for every model of a run."""

import pandas as pd

from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.claims import contrasts, verdicts
from quantgrid.reporting.data.collection import read, write


def main() -> None:
    job = arguments("results", "samples", "statements", "claims", several=("samples",))
    items = pd.concat([pd.read_parquet(path) for path in job.samples]).drop_duplicates(
        ["cell", "metric", "dataset", "item"]
    )
    claims, equal = contrasts.read(job.statements), contrasts.margins(job.statements)
    write(verdicts.evaluate(claims, equal, read(job.results), items, job.spec["config"]), job.claims)


if __name__ == "__main__":
    run(main)
