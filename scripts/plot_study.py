"""Draw the figure of one study as PNG, PDF and SVG, and write its data beside it."""

from quantgrid.job import arguments, run
from quantgrid.reporting import figures
from quantgrid.reporting.records import read_records


def main() -> None:
    job = arguments("records", "png", "pdf", "svg", "csv")
    records = read_records(job.records)
    figures.save(figures.plot(records, job.spec), [job.png, job.pdf, job.svg])
    figures.write_data(records, job.spec, job.csv)


if __name__ == "__main__":
    run(main)
