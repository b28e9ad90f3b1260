"""Plot the figure of one study as PNG, PDF and SVG, and write its data next to it."""

from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.figures import study_figures


def main() -> None:
    job = arguments("records", "png", "pdf", "svg", "csv")
    records = read_records(job.records)
    study_figures.save(study_figures.plot(records, job.spec), [job.png, job.pdf, job.svg])
    study_figures.write_data(records, job.spec, job.csv)


if __name__ == "__main__":
    run(main)
