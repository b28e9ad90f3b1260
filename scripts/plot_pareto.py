"""Draw perplexity against stored bits of all cells, the Pareto front labelled, and write its data beside it."""

from quantgrid.job import arguments, run
from quantgrid.reporting import pareto
from quantgrid.reporting.collection import read
from quantgrid.reporting.figures import save
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("results", "png", "pdf", "svg", "csv")
    marks = pareto.points(read(job.results))
    save(pareto.plot(marks), [job.png, job.pdf, job.svg])
    write_text(job.csv, marks.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
