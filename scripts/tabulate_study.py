"""Write the table of one study as CSV, Markdown and LaTeX."""

from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.tables import study_tables, writers


def main() -> None:
    job = arguments("records", "csv", "md", "tex")
    writers.write(study_tables.build(read_records(job.records), job.spec), [job.csv, job.md, job.tex])


if __name__ == "__main__":
    run(main)
