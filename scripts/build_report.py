"""Build the report of all studies: one self-contained HTML page."""

from pathlib import Path
from typing import Any

from quantgrid.ground.storage import write_text
from quantgrid.jobs.integrity import verify
from quantgrid.jobs.job import arguments, run
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.claims import findings
from quantgrid.reporting.claims.recommendation import joined
from quantgrid.reporting.data import collection, costs, races
from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.page import page_context, report
from quantgrid.reporting.page.answer import answer
from quantgrid.reporting.page.race_sections import race_section


def shown_races(plan: Plan, paths: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Map each study to the sections of its races; ``paths`` are the decisions that end them, in the
    order of studies and models."""
    found: dict[str, list[dict[str, Any]]] = {study: [] for study in plan.studies}
    raced = [race for own in plan.raced.values() for race in own]
    for race, path in zip(raced, paths, strict=True):
        found[race.study].append(race_section(race, races.read(path), plan.config["formats"]))
    return found


def main() -> None:
    job = arguments(
        "results",
        "studies",
        "samples",
        "figures",
        "losses",
        "distributions",
        "claims",
        "pareto",
        "lines",
        "residual_error",
        "allocations",
        "decisions",
        "report",
        optional=("losses", "distributions", "residual_error", "allocations"),
        several=("studies", "samples", "figures", "distributions", "decisions"),
    )
    config, base = job.spec["config"], Path(job.report).parent
    for figure in filter(None, [*job.figures, job.pareto, job.lines, job.residual_error, job.allocations]):
        # the page embeds the CSV; object storage delivers only the files that a job requests
        if (numbers := Path(figure).with_suffix(".csv")).is_file():
            verify(numbers)
    plan = Plan(
        {**config, "results_dir": str(base)}
    )  # the folder of the report, not the config's: a module's prefix may differ
    raced = shown_races(plan, job.decisions)
    sections = [
        page_context.section(Path(records).stem, config, read_records(records), figure, base, raced[Path(records).stem])
        for records, figure in zip(job.studies, job.figures)
    ]
    evaluations = [
        collection.read_evaluations(plan.possible_evaluations(study), missing_allowed=True) for study in plan.studies
    ]
    context = page_context.context(
        config,
        job.spec["versions"],
        costs.read(base / "benchmarks"),
        evaluations,
        losses=job.losses,
        drawn=job.distributions or (),
    )
    context |= answer(collection.read(job.results), joined(job.samples), config, plan, base)
    explained = {reason["cell"] for reason in context["reasons"]}
    of_races = [reason for own in raced.values() for race in own for reason in race["reasons"]]
    context["reasons"] += [reason for reason in of_races if reason["cell"] not in explained]
    context |= {
        "claims": findings.read(job.claims),
        "overview": page_context.overview(job.pareto, job.lines, job.residual_error, base, job.allocations),
    }
    write_text(job.report, report.build(sections, context))
    (base / "report.partial.html").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
