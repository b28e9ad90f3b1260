"""Gather the evaluations of one study as tidy records, with paired differences to full precision."""

from quantgrid.job import arguments, run
from quantgrid.pipeline import Plan
from quantgrid.reporting.collection import read_evaluations, records, write


def main() -> None:
    job = arguments("records")
    plan = Plan(job.spec["config"])
    write(records(read_evaluations(plan.evaluations(job.spec["study"]))), job.records)


if __name__ == "__main__":
    run(main)
