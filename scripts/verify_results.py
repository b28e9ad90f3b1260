"""Verify every file of a config's results folder against its record (`make verify`).

    python scripts/verify_results.py --configfile config/config.yaml [--repair | --adopt]

--repair deletes damaged files and their records, so that the next run recomputes them; --adopt
records files without a record as they are.
"""

import argparse
import os

from quantgrid.config.validation import load
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.audit import adopt, audit, repair
from quantgrid.jobs.drivers import require_no_run
from quantgrid.jobs.job import run
from quantgrid.jobs.locks import hold
from quantgrid.plan.pipeline import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", default="config/config.yaml")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--repair", action="store_true", help="delete damaged files")
    change.add_argument("--adopt", action="store_true", help="record files without a record")
    asked = parser.parse_args()
    plan = Plan(load(asked.configfile))
    if asked.repair or asked.adopt:
        require_no_run(os.getcwd())
        if os.path.isdir(plan.results):
            hold(plan.results)
    found = audit(plan, os.cpu_count() or 1)
    for wrong in found.damaged.values():
        print(wrong)
    for record in found.unrecorded:
        print(f"{record}: no such record; the outputs of this job cannot be verified")
    for path in repair(found) if asked.repair else ():
        print(f"deleted {path}")
    adopted = adopt(found) if asked.adopt else []
    for record in adopted:
        print(f"recorded {record}")
    print(
        f"{plan.results}: {found.whole} files as they were written, {len(found.damaged)} outputs damaged, "
        f"{len(found.unrecorded) - len(adopted)} jobs without a record"
    )
    if found.unrecorded and not asked.adopt:
        print(
            "outputs without a record are recomputed when a job needs them; `make verify ADOPT=1` records them as they "
            "are"
        )
    if found.damaged and not asked.repair:
        raise ConfigError("`make verify REPAIR=1` deletes damaged files; the next run recomputes them")


if __name__ == "__main__":
    run(main)
