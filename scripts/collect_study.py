"""Gather the evaluations of one study as tidy records, with paired differences to full precision, and the windows and samples behind them."""

from quantgrid.job import arguments, run
from quantgrid.pipeline import Plan
from quantgrid.reporting.collection import items, read_evaluations, records, write


def main() -> None:
    job = arguments("first", "records", "items")
    study, plan = job.spec["study"], Plan(job.spec["config"])
    # Snakemake may keep results elsewhere than the config says (a prefix, a storage): where the first file is shows where all are.
    place = job.first.removesuffix(plan.study_inputs(study)[0])
    evaluations = read_evaluations({cell: {name: place + path for name, path in named.items()} for cell, named in plan.evaluations(study).items()})
    write(records(evaluations), job.records)
    write(items(evaluations), job.items)


if __name__ == "__main__":
    run(main)
