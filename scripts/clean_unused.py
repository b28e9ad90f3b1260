"""List files in a config's results folder that the config no longer plans; delete them with
--delete (`make clean-unused`).

    python scripts/clean_unused.py --configfile config/config.yaml [--delete]
"""

import argparse
import os

from quantgrid.config.validation import load
from quantgrid.jobs.drivers import require_no_run
from quantgrid.jobs.job import run
from quantgrid.jobs.locks import hold
from quantgrid.jobs.stale import delete, unused
from quantgrid.plan.pipeline import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", default="config/config.yaml")
    parser.add_argument("--delete", action="store_true")
    given = parser.parse_args()
    plan = Plan(load(given.configfile))
    found = unused(plan)
    for place in (place for place in found if place.files):
        print(f"{place.size / 2**20:10.2f} MiB  {len(place.files):4d} files  {plan.results}/{place.place}")
    if foreign := [file for place in found for file in place.foreign]:
        print(
            f"{len(foreign)} files are kept because no record names them as written by "
            f"quantgrid, such as {foreign[0]}\n"
            "(results older than the records: run `make verify ADOPT=1` with the config that made them)"
        )
    print(
        f"{sum(place.size for place in found) / 2**20:10.2f} MiB  {sum(len(place.files) for place in found):4d} files "
        f"that {given.configfile} "
        "no longer plans"
    )
    if not given.delete:
        print("nothing is deleted; `make clean-unused YES=1` deletes them" if found else "nothing to delete")
        return
    require_no_run(os.getcwd())
    if os.path.isdir(plan.results):
        hold(plan.results)
    delete(found, plan.results)
    print("deleted")


if __name__ == "__main__":
    run(main)
