"""Plot divergence against stored bits of allocations, with the predicted front and the uniform schemes."""

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data.collection import read
from quantgrid.reporting.figures import allocations
from quantgrid.reporting.figures.study_figures import save


def main() -> None:
    job = arguments("allocated", "results", "png", "pdf", "svg", "csv", several=("allocated",))
    marks = allocations.points(job.allocated, read(job.results))
    save(allocations.plot(marks), [job.png, job.pdf, job.svg])
    write_text(job.csv, marks.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
