"""Plot magnitudes and kurtosis of the inputs and weights of one model, before and after each of its
transforms."""

from quantgrid.ground.storage import write_text
from quantgrid.jobs.job import arguments, run
from quantgrid.reporting.data import descriptions
from quantgrid.reporting.figures import distributions
from quantgrid.reporting.figures.study_figures import save


def main() -> None:
    job = arguments("distributions", "png", "pdf", "svg", "csv", several=("distributions", "png", "pdf", "svg", "csv"))
    described = descriptions.read(job.distributions)
    for name, csv, *images in zip(job.spec["figures"], job.csv, job.png, job.pdf, job.svg, strict=True):
        figure, table = distributions.build(name, described)
        save(figure, images)
        write_text(csv, table.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    run(main)
