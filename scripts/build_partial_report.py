"""Build a report from the existing evaluations after a failed run; it lists the missing cells."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from quantgrid.config.shown_transforms import FIGURES
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import write_text
from quantgrid.jobs.integrity import sound
from quantgrid.jobs.job import arguments, run
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.data import collection, costs
from quantgrid.reporting.data.records import tidy
from quantgrid.reporting.figures import study_figures
from quantgrid.reporting.page import page_context, report
from quantgrid.reporting.page.answer import answer


def drawn_study(records: pd.DataFrame, spec: Mapping[str, Any], path: Path) -> Path | None:
    """Draw the figure of a study to ``path``; None if too few cells exist for a figure (the report
    lists the missing ones)."""
    try:
        study_figures.save(study_figures.plot(records, spec), [path])
    except (ConfigError, ValueError):
        return None
    return path


def costs_so_far(base: Path) -> list[dict[str, Any]]:
    """Read the costs of the jobs; empty if one of the files cannot be read, which may be why the
    run failed."""
    try:
        return costs.read(base / "benchmarks")
    except ConfigError as error:
        print(f"build_partial_report: {error}", file=sys.stderr)
        return []


def answer_so_far(
    measured: list[tuple[pd.DataFrame, pd.DataFrame]], config: Mapping[str, Any], plan: Plan, base: Path
) -> dict[str, Any]:
    """Recommend among the cells that exist, from (records, items) of the studies; empty, with the reason
    in the log, if they do not fit together."""
    try:
        records = collection.merge([records for records, _ in measured])
        items = pd.concat([items for _, items in measured]).drop_duplicates(["cell", "metric", "dataset", "item"])
        return answer(records, items, config, plan, base)
    except (ConfigError, ValueError) as error:
        print(f"build_partial_report: no recommendations: {error}", file=sys.stderr)
        return {}


def main() -> None:
    job = arguments("report")
    config, base = job.spec["config"], Path(job.report).parent
    plan, sections, missing, evaluations, measured = Plan(config), [], {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        for study in plan.studies:
            wanted, damaged = plan.evaluations(study), {}
            found = collection.read_evaluations(wanted, missing_allowed=True, damaged=damaged)
            missing |= {entry["cell"]: entry for entry in page_context.missing_cells(wanted, found, damaged)}
            try:
                records = tidy(collection.records(found))
            except ConfigError as error:  # cells that do not fit in one table
                print(f"build_partial_report: study '{study}' is left out: {error}", file=sys.stderr)
                continue
            evaluations.append(found)
            measured.append((records, collection.items(found)))
            figure = drawn_study(records, {"study": study, **config["studies"][study]}, Path(folder) / f"{study}.svg")
            sections.append(page_context.section(study, config, records, figure, base))
        losses = base / "learning.svg"
        shown = (base / "distributions" / model / f"{name}.svg" for model in plan.distributions() for name in FIGURES)
        context = page_context.context(
            config,
            job.spec["versions"],
            costs_so_far(base),
            evaluations,
            list(missing.values()),
            losses if sound(losses) else None,
            [path for path in shown if sound(path)],
        )
        write_text(job.report, report.build(sections, context | answer_so_far(measured, config, plan, base)))


if __name__ == "__main__":
    run(main)
