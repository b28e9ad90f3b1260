"""Plot the number lines of INT4, FP4, MXFP4 and NVFP4, and write their values next to the
figure."""

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.figures import number_lines
from quantgrid.reporting.figures.study_figures import save


def main() -> None:
    job = arguments("png", "pdf", "svg", "csv")
    save(number_lines.plot(), [job.png, job.pdf, job.svg])
    write_text(job.csv, number_lines.table().to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
