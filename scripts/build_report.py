"""Build the report of all studies: one self-contained HTML page."""

import os
from pathlib import Path

from quantgrid.job import arguments, run
from quantgrid.reporting import costs, report
from quantgrid.reporting.records import read_records
from quantgrid.storage import write_text


def section(name: str, records: str, figure: str, config: dict, base: Path) -> report.StudySection:
    spec = {"study": name, **config["studies"][name]}
    beside = {"table": Path(records).parents[1] / "tables" / name, "figure": Path(figure).with_suffix("")}
    files = {"records, CSV": Path(records)} | {f"{kind}, {suffix}": path.with_suffix(f".{suffix}") for kind, path in beside.items()
                                              for suffix in ("csv", "md", "tex", "png", "pdf", "svg")}
    links = {what: os.path.relpath(path, base) for what, path in files.items() if path.is_file()}
    return report.StudySection(spec, read_records(records), figure, links)


def main() -> None:
    job = arguments("results", "studies", "figures", "report", several=("studies", "figures"))
    config, base = job.spec["config"], Path(job.report).parent
    sections = [section(Path(records).stem, records, figure, config, base) for records, figure in zip(job.studies, job.figures)]
    models = [{"name": name, "provenance": entry.get("note", ""), "source": entry.get("package") or entry.get("id") or entry.get("path")}
              for name, entry in config["models"].items()]
    corpora = [{"name": name, **{key: str(value) for key, value in entry.items()}} for name, entry in config["corpora"].items()]
    context = {"title": config["report"]["title"], "models": models, "corpora": corpora, "config": config, "versions": job.spec["versions"],
               "benchmarks": costs.read(base / "benchmarks")}
    write_text(job.report, report.build(sections, context))


if __name__ == "__main__":
    run(main)
