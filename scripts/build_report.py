"""Build the report of all studies: one self-contained HTML page."""

from pathlib import Path

from quantgrid.job import arguments, run
from quantgrid.reporting import page, report
from quantgrid.reporting.records import read_records
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("results", "studies", "figures", "losses", "distributions", "report", optional=("losses", "distributions"),
                    several=("studies", "figures", "distributions"))
    config, base = job.spec["config"], Path(job.report).parent
    sections = [page.section(Path(records).stem, config, read_records(records), figure, base) for records, figure in zip(job.studies, job.figures)]
    context = page.context(config, job.spec["versions"], base, losses=job.losses, drawn=job.distributions or ())
    write_text(job.report, report.build(sections, context))
    (base / "report.partial.html").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
