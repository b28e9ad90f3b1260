"""Compare the cells of one study, item by item, with their counterparts named in the config; write
CSV, Markdown and LaTeX."""

import pandas as pd

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data.collection import write
from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.tables import comparisons, writers


def main() -> None:
    job = arguments("records", "samples", "csv", "md", "tex")
    found = comparisons.evaluate(read_records(job.records), pd.read_parquet(job.samples), job.spec)
    write(found, job.csv)
    if found.empty:  # failed cells are results; the job does not fail because of them
        for path in (job.md, job.tex):
            write_text(path, comparisons.NOTHING)
    else:
        writers.write(comparisons.table(found, job.spec), [job.md, job.tex])


if __name__ == "__main__":
    run(main)
