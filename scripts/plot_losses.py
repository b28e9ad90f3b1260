"""Draw the losses of all trainings, of transforms and of mitigations."""

from quantgrid.job import arguments, run
from quantgrid.reporting import losses
from quantgrid.reporting.figures import save
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("losses", "png", "pdf", "svg", "csv", several=("losses",))
    table = losses.read(job.losses, job.spec["labels"])
    save(losses.plot(table, job.spec["labels"]), [job.png, job.pdf, job.svg])
    write_text(job.csv, table.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
