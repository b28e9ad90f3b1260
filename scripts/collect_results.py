"""Merge the records of all studies: results.csv, results.parquet, and cells.csv from keys to axes."""

import pandas as pd

from quantgrid.job import arguments, run
from quantgrid.reporting.collection import merge, write


def main() -> None:
    job = arguments("studies", "csv", "parquet", "cells", several=("studies",))
    merged = merge([pd.read_csv(path, dtype={"reason": str}, keep_default_na=False, na_values={"value": "", "stderr": ""}) for path in job.studies])
    write(merged, job.csv)
    write(merged, job.parquet)
    write(merged[["cell", "model", "transform", "mitigation", "granularity", "format", "status"]].drop_duplicates(), job.cells)


if __name__ == "__main__":
    run(main)
