"""Say what a run of a config would take: cells, jobs, hours and disk, and what its largest jobs would. Nothing is computed."""

import argparse
from types import SimpleNamespace

from quantgrid import config as configs
from quantgrid.errors import ConfigError
from quantgrid.estimates import text
from quantgrid.pipeline import Plan
from quantgrid.preflight import needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configfile", required=True)
    try:
        plan = Plan(configs.load(parser.parse_args().configfile))
        print(text(plan))
        jobs = ((step.rule, SimpleNamespace(**step.wildcards)) for steps in plan.all_steps().values() for step in steps)
        print("largest jobs:", *needs(plan, jobs), sep="\n  ")
    except ConfigError as error:
        raise SystemExit(f"estimate_run: {error}") from None


if __name__ == "__main__":
    main()
