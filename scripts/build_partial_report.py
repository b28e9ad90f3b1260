"""Build a report from the evaluations that exist, after a run that failed; what is missing is listed in it."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from quantgrid.errors import ConfigError
from quantgrid.integrity import sound
from quantgrid.job import arguments, run
from quantgrid.pipeline import Plan
from quantgrid.reporting import collection, costs, figures, page, report
from quantgrid.reporting.records import tidy
from quantgrid.shown_transforms import FIGURES
from quantgrid.storage import write_text


def drawn_study(records: pd.DataFrame, spec: Mapping[str, Any], path: Path) -> Path | None:
    """The figure of a study at ``path``; None where too little of it exists to be drawn: the report says what is missing."""
    try:
        figures.save(figures.plot(records, spec), [path])
    except (ConfigError, ValueError):
        return None
    return path


def costs_so_far(base: Path) -> list[dict[str, Any]]:
    """The costs of the jobs; none where one of their files cannot be read, which may be what the run failed of."""
    try:
        return costs.read(base / "benchmarks")
    except ConfigError as error:
        print(f"build_partial_report: {error}", file=sys.stderr)
        return []


def main() -> None:
    job = arguments("report")
    config, base = job.spec["config"], Path(job.report).parent
    plan, sections, missing, evaluations = Plan(config), [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        for study in plan.studies:
            wanted, damaged = plan.evaluations(study), {}
            found = collection.read_evaluations(wanted, missing_allowed=True, damaged=damaged)
            missing |= {entry["cell"]: entry for entry in page.missing_cells(wanted, found, damaged)}
            try:
                records = tidy(collection.records(found))
            except ConfigError as error:  # cells that cannot stand in one table
                print(f"build_partial_report: study '{study}' is left out: {error}", file=sys.stderr)
                continue
            evaluations.append(found)
            figure = drawn_study(records, {"study": study, **config["studies"][study]}, Path(folder) / f"{study}.svg")
            sections.append(page.section(study, config, records, figure, base))
        losses = base / "learning.svg"
        shown = (base / "distributions" / model / f"{name}.svg" for model in plan.distributions() for name in FIGURES)
        context = page.context(config, job.spec["versions"], costs_so_far(base), evaluations, list(missing.values()),
                               losses if sound(losses) else None, [path for path in shown if sound(path)])
        write_text(job.report, report.build(sections, context))


if __name__ == "__main__":
    run(main)
