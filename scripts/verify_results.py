"""Verify every file of a config's results folder against the record that its job left; what `make verify` calls.

    python scripts/verify_results.py --configfile config/config.yaml [--repair | --adopt]

--repair deletes what is damaged, with its record, so that the next run makes it again; --adopt records, as they are, files that have no record.
"""

import argparse
import os

from quantgrid.audit import adopt, audit, repair
from quantgrid.config import load
from quantgrid.drivers import require_no_run
from quantgrid.errors import ConfigError
from quantgrid.job import run
from quantgrid.locks import hold
from quantgrid.pipeline import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", default="config/config.yaml")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--repair", action="store_true", help="delete what is damaged")
    change.add_argument("--adopt", action="store_true", help="record what has no record")
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
        print(f"{record}: no such record, so nothing is known of what its job left")
    for path in repair(found) if asked.repair else ():
        print(f"deleted {path}")
    adopted = adopt(found) if asked.adopt else []
    for record in adopted:
        print(f"recorded {record}")
    print(f"{plan.results}: {found.whole} files as they were written, {len(found.damaged)} outputs damaged, "
          f"{len(found.unrecorded) - len(adopted)} jobs without a record")
    if found.unrecorded and not asked.adopt:
        print("what has no record is made again once something needs it; `make verify ADOPT=1` records it as it is")
    if found.damaged and not asked.repair:
        raise ConfigError("`make verify REPAIR=1` deletes what is damaged, and the next run makes it again")


if __name__ == "__main__":
    run(main)
