"""List every step behind the cells of a config as CSV: rule, key, axes and output files."""

import csv

from quantgrid.ground.storage import replacing
from quantgrid.jobs.job import arguments, run
from quantgrid.plan.pipeline import Plan

AXES = ("model", "transform", "mitigation", "granularity", "format", "target", "corpus", "calibration")
COLUMNS = ("rule", "key", *AXES, "output", "path")


def main() -> None:
    job = arguments("steps")
    plan = Plan(job.spec["config"])
    with replacing(job.steps) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for rule, steps in plan.all_steps().items():
            for step in steps:
                axes = [step.wildcards.get(axis, "") for axis in AXES]
                table.writerows([rule, step.key, *axes, output, path] for output, path in step.outputs.items())


if __name__ == "__main__":
    run(main)
