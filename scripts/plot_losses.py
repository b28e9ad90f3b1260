"""Plot the training losses of all transforms and mitigations."""

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.figures import losses
from quantgrid.reporting.figures.study_figures import save


def main() -> None:
    job = arguments("losses", "png", "pdf", "svg", "csv", several=("losses",))
    table = losses.read(job.losses, job.spec["labels"])
    save(losses.plot(table, job.spec["labels"]), [job.png, job.pdf, job.svg])
    write_text(job.csv, table.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
