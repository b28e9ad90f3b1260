"""Gather the evaluations of one study as tidy records, with paired differences to full precision, and the windows and samples behind them."""

from quantgrid.job import arguments, run
from quantgrid.pipeline import Plan
from quantgrid.reporting.collection import items, read_evaluations, records, write


def main() -> None:
    job = arguments("records", "items")
    plan = Plan(job.spec["config"])
    evaluations = read_evaluations(plan.evaluations(job.spec["study"]))
    write(records(evaluations), job.records)
    write(items(evaluations), job.items)


if __name__ == "__main__":
    run(main)
