"""Plot divergence against stored bits of all cells with the Pareto fronts labelled, and write the
data next to the figure."""

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data.collection import read
from quantgrid.reporting.figures import pareto
from quantgrid.reporting.figures.study_figures import save


def main() -> None:
    job = arguments("results", "png", "pdf", "svg", "csv")
    marks = pareto.points(read(job.results), job.spec["formats"])
    save(pareto.plot(marks), [job.png, job.pdf, job.svg])
    write_text(job.csv, marks.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
