"""Record the jobs of a finished run, with predicted and measured seconds, for the tests of the time left.

    python tests/record_timeline.py --configfile config/config.yaml LOG tests/data/timelines/NAME.csv

LOG is Snakemake's log of a run from nothing to its report on this machine, whose moments are whole seconds.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from quantgrid.config import validation  # noqa: E402 (the library is in scripts/, not installed)
from quantgrid.plan.estimates import CPU, Estimate  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402

STARTED = r"(?:local)?(?:rule|checkpoint) (?P<rule>\w+):\n(?P<body>(?:    .*\n)+)"
EVENT = re.compile(rf"^\[(?P<moment>.+)\]\n(?:{STARTED}|Finished jobid: (?P<ended>\d+))", re.MULTILINE)
COLUMNS = ("rule", "axes", "predicted", "seconds", "submitted", "begun", "ended")


def timeline(log: str, estimate: Estimate) -> list[dict[str, str]]:
    """List the jobs of a log in the order in which they ended (``COLUMNS``; seconds since the first
    job began). ``predicted`` are those of ``estimate`` on a CPU."""
    begun: dict[str, tuple[float, str, dict[str, str]]] = {}
    rows = []
    for event in EVENT.finditer(log):
        now = datetime.strptime(event["moment"], "%a %b %d %H:%M:%S %Y").timestamp()
        if event["rule"]:
            fields = dict(line.strip().split(": ", 1) for line in event["body"].splitlines() if ": " in line)
            axes = dict(pair.split("=", 1) for pair in fields.get("wildcards", "").split(", ") if pair)
            begun[fields["jobid"]] = now, event["rule"], axes
            continue
        start, rule, axes = begun[event["ended"]]
        first = min(moment for moment, *_ in begun.values())
        moments = {"submitted": start - first, "begun": start - first, "ended": now - first}
        numbers = {"predicted": estimate.seconds_of(rule, axes, CPU), "seconds": now - start, **moments}
        named = " ".join(f"{name}={value}" for name, value in axes.items() if name != "key")
        rows.append({"rule": rule, "axes": named, **{name: f"{value:.2f}" for name, value in numbers.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", type=Path, required=True)
    parser.add_argument("log", type=Path)
    parser.add_argument("table", type=Path)
    options = parser.parse_args()
    rows = timeline(options.log.read_text(), Estimate(Plan(validation.load(options.configfile))))
    with options.table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
