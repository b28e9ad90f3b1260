"""Estimate a run without computing anything: cells, jobs, hours, disk, and the largest jobs."""

import argparse
from types import SimpleNamespace

from quantgrid.config import validation
from quantgrid.ground.errors import ConfigError
from quantgrid.plan.estimates import text
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.preflight import needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configfile", required=True)
    try:
        plan = Plan(validation.load(parser.parse_args().configfile))
        print(text(plan))
        jobs = ((step.rule, SimpleNamespace(**step.wildcards)) for steps in plan.all_steps().values() for step in steps)
        print("largest jobs:", *needs(plan, jobs, plan.config["compute"]["device"] != "cpu"), sep="\n  ")
    except ConfigError as error:
        raise SystemExit(f"estimate_run: {error}") from None


if __name__ == "__main__":
    main()
