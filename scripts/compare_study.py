"""Compare the cells of one study, item by item, with the ones that its config names; write CSV, Markdown and LaTeX."""

import pandas as pd

from quantgrid.job import arguments, run
from quantgrid.reporting import comparisons, table_writers
from quantgrid.reporting.collection import write
from quantgrid.reporting.records import read_records
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("records", "items", "csv", "md", "tex")
    found = comparisons.evaluate(read_records(job.records), pd.read_parquet(job.items), job.spec)
    write(found, job.csv)
    if found.empty:  # failed cells are results, and no reason to fail here
        for path in (job.md, job.tex):
            write_text(path, comparisons.NOTHING)
    else:
        table_writers.write(comparisons.table(found, job.spec), [job.md, job.tex])


if __name__ == "__main__":
    run(main)
