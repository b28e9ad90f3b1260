"""Results that nothing computed, for looking at tables, figures and the report: JSON of the form
that evaluations write, at the paths of a plan.

Losses follow a simple rule of the axes, with windows in common, so that pairing, intervals and
verdicts have something to work on. By hand:

    python tests/synthetic_results.py config/studies.yaml /tmp/folder w16a4

Cells of that format fail; look at /tmp/folder/report.html.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from quantgrid.config import validation
from quantgrid.config.cells import Cell, baseline
from quantgrid.config.grid import asked
from quantgrid.jobs.integrity import origin_of, write_record
from quantgrid.plan.pipeline import Plan
from quantgrid.reporting.claims import findings, verdicts
from quantgrid.reporting.data import collection
from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.figures import number_lines, pareto, residual_error, study_figures
from quantgrid.reporting.page import page_context, report
from quantgrid.reporting.page.answer import answer
from quantgrid.reporting.tables import study_tables, writers

WINDOWS = 32


def losses(cell: Cell) -> np.ndarray:
    """Negative log-likelihood of every window, nats per token; lower with a rotation, GPTQ, finer
    groups and more bits."""
    shared, own = np.random.default_rng(0), np.random.default_rng(zlib.crc32(cell.path.encode()))
    above = 0.0
    if cell.quantized:
        group = int(cell.granularity.rpartition("-")[2]) if cell.granularity.startswith("group") else 576
        above = (
            1.5 * (0.4 + group / 576) * (0.3 if "rotation" in cell.transform or "hadamard" in cell.transform else 1.0)
        )
        above *= {"rtn": 1.0, "low-rank": 0.93}.get(cell.mitigation, 0.6) * (3.0 if "e2m1-e2m1" in cell.format else 1.0)
    return shared.normal(2.7, 0.3, WINDOWS) + above * own.normal(1, 0.05, WINDOWS)


def content(plan: Plan, cell: Cell, name: str, path: str) -> dict[str, Any]:
    """One evaluation of one cell."""
    kind, _, dataset = name.partition(".")
    about = {
        "axes": {**cell.axes, "key": Path(path).stem, **({"corpus": dataset} if dataset else {})},
        "status": "ok",
        "model": {"weights_sha256": {"model.safetensors": "0" * 64}},
    }
    values = losses(cell)
    if kind == "perplexity":
        protocol = {
            "name": "token perplexity, windows of 256",
            "corpus": dataset,
            "text_sha256": "ab" * 32,
            "window": 256,
            "stride": 256,
            "bos": False,
            "normalization": "token",
            "dtype": "float32",
            "join": "\n\n",
            "windows": WINDOWS,
            "tokens": 256 * WINDOWS,
        }
        divergence = np.maximum(values - losses(baseline(cell.model)), 0) + 1e-4
        return {
            **about,
            "corpus": {"corpus": dataset, "text_sha256": "ab" * 32},
            "protocol": protocol,
            "windows": {"negative_log_likelihood": values.tolist(), "kl_divergence": divergence.tolist()},
        }
    if kind == "error":
        linears = {f"0.{linear}": {"bits": bits(cell)} for linear in "qkvo"}
        summary = {
            "bits": bits(cell),
            "stored_bits": bits(cell) + 0.01,
            "online_operations": 1000 * len(cell.transform),
            "added_parameters": 0,
            "untied_parameters": 0,
            "weight_sqnr_db": 20.0,
            "output_sqnr_db": 18.0,
            "joint_output_sqnr_db": 15.0,
        }
        return {**about, "summary": summary, "linears": linears, "details": {}}
    if kind == "residual_error":
        growth = [{"error": 0.02 * layer, "added": 0.05, "passed_on": 0.017 * layer} for layer in range(1, 31)]
        return {
            **about,
            "layers": [{part: value * (1 + values.mean() - 2.7) for part, value in layer.items()} for layer in growth],
            "windows": 4,
        }
    found = {}
    wanted = [
        asked(plan.config, plan.config["studies"][study])["tasks"]
        for study, cells in plan.studies.items()
        if cell in cells
    ]
    for task in next(filter(None, wanted)):
        outcomes = (np.random.default_rng(len(task)).random(100) < 0.9 - values.mean() / 8).astype(float).tolist()
        found[task] = {
            "value": float(np.mean(outcomes)),
            "stderr": 0.05,
            "count": 100,
            "outcomes": outcomes,
            "documents_sha256": "cd" * 32,
            "protocol": {"name": task, "task": task, "metric": "acc", "shots": 0, "batch_size": 4},
        }
    return {**about, "tasks": found}


def bits(cell: Cell) -> float:
    if not cell.quantized:
        return 16.0
    group = int(cell.granularity.rpartition("-")[2]) if cell.granularity.startswith("group") else 576
    return 4 + 32 / group + (0.4 if "low" in cell.mitigation else 0.0)


def write(plan: Plan, failed: str = "") -> None:
    """All evaluations of a plan to their paths; a cell with ``failed`` in its path fails."""
    for study in plan.studies:
        for cell, paths in plan.evaluations(study).items():
            for name, path in paths.items():
                found = content(plan, cell, name, path)
                if failed and failed in cell.path:
                    found = {
                        "axes": found["axes"],
                        "status": "failed",
                        "reason": "layer 3: no damping makes the Hessian positive definite",
                    }
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(json.dumps(found))
                write_record(origin_of(path).rule, [path])


def studies(plan: Plan) -> list[report.StudySection]:
    """Records, items, tables and figures of every study in their files, and the sections of the
    report."""
    base, sections = Path(plan.results), []
    for folder in ("studies", "tables", "figures"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for study in plan.studies:
        spec, found = (
            {"study": study, **plan.config["studies"][study]},
            collection.read_evaluations(plan.evaluations(study)),
        )
        collection.write(collection.records(found), base / "studies" / f"{study}.csv")
        collection.write(collection.items(found), base / "studies" / f"{study}.items.parquet")
        records = read_records(base / "studies" / f"{study}.csv")
        writers.write(
            study_tables.build(records, spec),
            [base / "tables" / f"{study}.{suffix}" for suffix in ("csv", "md", "tex")],
        )
        study_figures.save(study_figures.plot(records, spec), [base / "figures" / f"{study}.svg"])
        study_figures.write_data(records, spec, base / "figures" / f"{study}.csv")
        sections.append(page_context.section(study, plan.config, records, base / "figures" / f"{study}.svg", base))
    return sections


def build(plan: Plan) -> Path:
    """The report of a plan whose evaluations are there."""
    base, sections = Path(plan.results), studies(plan)
    results = collection.merge([collection.read(base / "studies" / f"{study}.csv") for study in plan.studies])
    collection.write(results, base / "results.csv")
    items = pd.concat([pd.read_parquet(path) for path in base.glob("studies/*.items.parquet")]).drop_duplicates(
        ["cell", "metric", "dataset", "item"]
    )
    collection.write(
        verdicts.evaluate(verdicts.read(), collection.read(base / "results.csv"), items, plan.config),
        base / "claims.csv",
    )
    records = collection.read(base / "results.csv")
    front, growth = pareto.points(records, plan.config["formats"]), residual_error.read(plan.residual_errors())
    for name, figure, data in (
        ("pareto", pareto.plot(front), front),
        ("number-lines", number_lines.plot(), number_lines.table()),
        ("residual-error", residual_error.plot(growth), growth),
    ):
        study_figures.save(figure, [base / f"{name}.svg"])
        collection.write(data, base / f"{name}.csv")
    evaluations = [collection.read_evaluations(plan.evaluations(study)) for study in plan.studies]
    context = page_context.context(plan.config, {"python": "3.11"}, (), evaluations)
    images = [base / f"{name}.svg" for name in ("pareto", "number-lines", "residual-error")]
    context |= {"claims": findings.read(base / "claims.csv"), "overview": page_context.overview(*images, base)}
    context |= answer(records, items, plan.config, plan, base)
    (base / "report.html").write_text(report.build(sections, context), encoding="utf-8")
    return base / "report.html"


if __name__ == "__main__":
    made = Plan(validation.check({**validation.read(sys.argv[1]), "results_dir": sys.argv[2]}))
    write(made, *sys.argv[3:])
    print(build(made))
