"""Collect the evaluations of one study as tidy records with paired differences to full precision,
and the per-window and per-sample values."""

from quantgrid.jobs.job import arguments, run
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.data import races
from quantgrid.reporting.data.collection import items, read_evaluations, records, write


def main() -> None:
    job = arguments("first", "decisions", "records", "samples", several=("decisions",))
    study, plan = job.spec["study"], Plan(job.spec["config"])
    decisions = [races.read(path) for path in job.decisions]
    wanted = plan.evaluations(study, decisions)
    # Snakemake may store results in another place than the config names (a prefix, a storage
    # provider). The path of the first file gives the place of all.
    place = job.first.removesuffix(plan.study_inputs(study)[0])
    evaluations = read_evaluations(
        {cell: {name: place + path for name, path in named.items()} for cell, named in wanted.items()}
    )
    for race, decision in zip(plan.raced.get(study, ()), decisions, strict=True):
        for cell, found in races.contents(race, decision).items():
            evaluations[cell][f"race.{race.corpus}"] = found
    write(records(evaluations), job.records)
    write(items(evaluations), job.samples)


if __name__ == "__main__":
    run(main)
