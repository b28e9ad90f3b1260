"""Build the report of all studies: one self-contained HTML page."""

from pathlib import Path

from quantgrid.integrity import verify
from quantgrid.job import arguments, run
from quantgrid.pipeline import Plan
from quantgrid.reporting import collection, costs, findings, page, report
from quantgrid.reporting.records import read_records
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("results", "studies", "figures", "losses", "distributions", "claims", "pareto", "lines", "depth", "report",
                    optional=("losses", "distributions", "depth"), several=("studies", "figures", "distributions"))
    config, base = job.spec["config"], Path(job.report).parent
    for figure in filter(None, [*job.figures, job.pareto, job.lines, job.depth]):
        if (numbers := Path(figure).with_suffix(".csv")).is_file():  # the page holds them too; an object storage gives what is asked for alone
            verify(numbers)
    sections = [page.section(Path(records).stem, config, read_records(records), figure, base) for records, figure in zip(job.studies, job.figures)]
    plan = Plan({**config, "results_dir": str(base)})  # where the report is, not where the config says: a module's prefix may lie between
    evaluations = [collection.read_evaluations(plan.evaluations(study), missing_allowed=True) for study in plan.studies]
    context = page.context(config, job.spec["versions"], costs.read(base / "benchmarks"), evaluations, losses=job.losses,
                           drawn=job.distributions or ())
    context |= {"claims": findings.read(job.claims), "overview": page.overview(job.pareto, job.lines, job.depth, base)}
    write_text(job.report, report.build(sections, context))
    (base / "report.partial.html").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
