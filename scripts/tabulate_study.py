"""Write the table of one study as CSV, Markdown and LaTeX."""

from quantgrid.job import arguments, run
from quantgrid.reporting import table_writers, tables
from quantgrid.reporting.records import read_records


def main() -> None:
    job = arguments("records", "csv", "md", "tex")
    table_writers.write(tables.build(read_records(job.records), job.spec), [job.csv, job.md, job.tex])


if __name__ == "__main__":
    run(main)
