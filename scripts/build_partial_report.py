"""Build a report from the evaluations that exist, after a run that failed; what is missing is listed in it."""

import tempfile
from pathlib import Path

from quantgrid.errors import ConfigError
from quantgrid.job import arguments, run
from quantgrid.pipeline import Plan
from quantgrid.reporting import collection, figures, page, report
from quantgrid.reporting.records import tidy
from quantgrid.shown_transforms import FIGURES
from quantgrid.storage import write_text


def main() -> None:
    job = arguments("report")
    config, base = job.spec["config"], Path(job.report).parent
    plan, sections, missing, evaluations = Plan(config), [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        for study in plan.studies:
            wanted = plan.evaluations(study)
            found = collection.read_evaluations(wanted, missing_allowed=True)
            missing |= {entry["cell"]: entry for entry in page.missing_cells(wanted, found)}
            evaluations.append(found)
            records, figure = tidy(collection.records(found)), Path(folder) / f"{study}.svg"
            try:
                figures.save(figures.plot(records, {"study": study, **config["studies"][study]}), [figure])
            except (ConfigError, ValueError):
                figure = None  # too little of this study exists to be drawn; the report says what is missing
            sections.append(page.section(study, config, records, figure, base))
        losses = base / "learning.svg"
        drawn = [path for model in plan.distributions() for name in FIGURES if (path := base / "distributions" / model / f"{name}.svg").is_file()]
        context = page.context(config, job.spec["versions"], base, evaluations, list(missing.values()), losses if losses.is_file() else None, drawn)
        write_text(job.report, report.build(sections, context))


if __name__ == "__main__":
    run(main)
