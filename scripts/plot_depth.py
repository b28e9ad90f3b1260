"""Draw how the error of the residual stream grows over the layers of quantized models."""

from quantgrid.job import arguments, run
from quantgrid.reporting import depth
from quantgrid.reporting.figures import save
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("depths", "png", "pdf", "svg", "csv", several=("depths",))
    table = depth.read(job.depths)
    save(depth.plot(table), [job.png, job.pdf, job.svg])
    write_text(job.csv, table.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
