"""Plot the growth of the residual-stream error over the layers of quantized models."""

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.figures import residual_error
from quantgrid.reporting.figures.study_figures import save


def main() -> None:
    job = arguments("measured", "png", "pdf", "svg", "csv", several=("measured",))
    table = residual_error.read(job.measured)
    save(residual_error.plot(table), [job.png, job.pdf, job.svg])
    write_text(job.csv, table.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
