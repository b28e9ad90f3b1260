"""Merge the records of all studies: results.csv, results.parquet, and cells.csv (cell keys and
their axes)."""

from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data.collection import merge, read, write
from quantgrid.reporting.data.records import AXES

COLUMNS = ["cell", *AXES, "status"]


def main() -> None:
    job = arguments("studies", "csv", "parquet", "cells", several=("studies",))
    merged = merge([read(path) for path in job.studies])
    write(merged, job.csv)
    write(merged, job.parquet)
    write(
        merged[COLUMNS].drop_duplicates("cell"),
        job.cells,
    )


if __name__ == "__main__":
    run(main)
