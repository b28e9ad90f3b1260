"""Growth of time and memory: ``python tests/benchmarks/growth.py`` (``make bench-growth``) runs
jobs on models that grow along one axis.

The jobs calibrate_model, quantize_model (RTN and GPTQ, INT4 in groups of 64) and
evaluate_perplexity are fresh processes with one thread on random Llamas, against hidden size,
layers and tokens; planning is a dry run of Snakemake, against cells. Time is that of the processors
(user and system), so that what else runs on the machine counts little; memory is the largest
resident size. Both are fitted by ``growth_fit.py`` as offset + growth * (size / largest)**exponent
and compared with the exponent of the algorithm's cost. Writes next to ``--output`` the table of
exponents (.csv), the measurements (-data.csv) and a figure (.png, .svg).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from dry_run import CELLS_PER_ALPHA, MODEL, config_of  # noqa: E402
from growth_fit import Fit, fit  # noqa: E402
from prepared import job  # noqa: E402
from random_models import WINDOW, Size  # noqa: E402
from records import write_table  # noqa: E402
from turns import Process, run  # noqa: E402

from checkouts import Checkout  # noqa: E402
from quantgrid.config import validation as configs  # noqa: E402
from quantgrid.jobs.integrity import origin_of, write_record  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.plan.steps import Step  # noqa: E402

CALIBRATE, RTN, GPTQ, EVALUATE, PLAN = (
    "calibrate_model",
    "quantize_model, RTN",
    "quantize_model, GPTQ",
    "evaluate_perplexity",
    "planning",
)
HIDDEN, LAYERS, TOKENS, CELLS = "hidden size (channels)", "decoder layers", "tokens", "cells of the grid"
QUANTITIES = {"processor_seconds": "processor seconds", "peak_mb": "peak memory (MB)"}
# Axis -> the jobs that are held against it -> exponents of their cost in time and in memory.
# RTN is cubic in the hidden size as GPTQ is: the job measures the errors of outputs, tr(E C Eᵀ).
# Tokens are windows of one length; quantize_model sees none of them.
ALL = (CALIBRATE, RTN, GPTQ, EVALUATE)
COSTS = {
    HIDDEN: {CALIBRATE: (2, 2), RTN: (3, 2), GPTQ: (3, 2), EVALUATE: (2, 2)},
    LAYERS: dict.fromkeys(ALL, (1, 1)),
    TOKENS: dict.fromkeys((CALIBRATE, EVALUATE), (1, 1)),
    CELLS: {PLAN: (1, 1)},
}
OWN = {
    (axis, name, quantity): own
    for axis, jobs in COSTS.items()
    for name, exponents in jobs.items()
    for quantity, own in zip(QUANTITIES, exponents)
}
TOLERANCE = 0.1  # by which a fitted exponent may lie above the own one
AXES = {HIDDEN: "hidden", LAYERS: "layers", TOKENS: "tokens"}  # axis -> what a Size calls it
SIZES = {
    HIDDEN: [Size(hidden, 2, 4) for hidden in (64, 256, 512, 1024, 1536)],
    LAYERS: [Size(256, layers, 4) for layers in (2, 8, 16, 32, 64)],
    TOKENS: [Size(256, 2, windows) for windows in (1, 4, 16, 64, 128)],
}
ALPHAS = (1, 4, 8, 16)  # of the dry runs: as many times CELLS_PER_ALPHA cells
DRAWN = ("model", "windows", "transform", "reference")  # inputs that no job makes


def steps() -> dict[str, Step]:
    """The jobs in the order in which they run; nothing of the model that the plan is of reaches the
    jobs."""
    study = {
        "models": ["llama"],
        "transforms": ["none"],
        "mitigations": ["rtn", "gptq"],
        "granularities": ["group-64"],
        "formats": ["int4"],
    }
    corpus = {"source": "builtin", "window": WINDOW}
    plan = Plan(
        configs.check(
            {
                "threads": 1,
                "compute": {"device": "cpu", "dtype": "float32"},
                "models": {"llama": MODEL},
                "corpora": {part: {**corpus, "part": part} for part in ("calibration", "evaluation")},
                "calibrations": {"default": {"corpus": "calibration"}},
                "transforms": {"none": {"method": "none"}},
                "mitigations": {name: {"method": name} for name in study["mitigations"]},
                "evaluate": {"perplexity": ["evaluation"]},
                "studies": {"growth": study},
            }
        )
    )
    [shard] = plan.shards("evaluation")
    rtn, gptq = (next(cell for cell in plan.cells if cell.mitigation == name) for name in study["mitigations"])
    return {
        CALIBRATE: plan.calibrate_model("llama", "default"),
        RTN: plan.quantize_model(rtn),
        GPTQ: plan.quantize_model(gptq),
        EVALUATE: plan.evaluate_perplexity(gptq, "evaluation", shard),
    }


def measured_jobs(size: Size, scratch: Path, jobs: dict[str, Step]) -> Iterator[tuple[str, Process]]:
    """Name and measurement of every job of ``jobs``, one after another, on a model of ``size``."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder, log = Path(place), scratch / "log"
        run(
            [sys.executable, str(Path(__file__).with_name("random_models.py")), "--folder", place, *size.options()],
            1,
            log,
        )
        for name, step in jobs.items():
            places = {
                file: folder / "results" / origin_of(path).place
                for file, path in {**step.inputs, **step.outputs}.items()
            }
            for file in (file for file in DRAWN if file in step.inputs and not places[file].exists()):
                places[file].parent.mkdir(parents=True, exist_ok=True)
                places[file].symlink_to(folder / file)
                write_record(origin_of(places[file]).rule, [places[file]])
            yield name, run(job(step, **places), 1, log)


def measured_plans(scratch: Path) -> Iterator[tuple[int, Process]]:
    """Number of cells and measurement of dry runs of one study each."""
    checkout = Checkout.make(scratch / "quantgrid")
    for alphas in ALPHAS:
        name = f"cells-{alphas}"
        checkout.write_config(config_of(alphas), name)
        yield (
            alphas * CELLS_PER_ALPHA,
            run(checkout.command(name, "--dry-run", "--quiet"), 1, scratch / "log", {}, checkout.folder),
        )


def measure(scratch: Path) -> Iterator[dict[str, Any]]:
    """The measurements, one after another; a size that lies on several axes is measured once."""
    jobs, known = steps(), {}
    for axis, sizes in SIZES.items():
        for size in sizes:
            if size not in known:
                known[size] = list(measured_jobs(size, scratch, jobs))
            yield from (point(axis, getattr(size, AXES[axis]), name, done) for name, done in known[size])
    for cells, done in measured_plans(scratch):
        yield point(CELLS, cells, PLAN, done)


def point(axis: str, size: int, name: str, done: Process) -> dict[str, Any]:
    print(
        f"{name} of {size} {axis}: {done.processor_seconds:.2f} s of a processor in {done.seconds:.2f} s, "
        f"{done.peak_mb:.0f} MB",
        flush=True,
    )
    return {
        "axis": axis,
        "size": size,
        "job": name,
        "processor_seconds": round(done.processor_seconds, 2),
        "seconds": round(done.seconds, 2),
        "peak_mb": round(done.peak_mb, 1),
    }


def fits_of(measured: list[dict[str, Any]]) -> dict[tuple[str, str, str], Fit]:
    """A fit for every axis, job and quantity of ``OWN``."""
    found = {}
    for axis, name, quantity in OWN:
        points = [(each["size"], each[quantity]) for each in measured if (each["axis"], each["job"]) == (axis, name)]
        found[axis, name, quantity] = fit(*zip(*points))
    return found


def table_of(fits: Mapping[tuple[str, str, str], Fit], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table: one for each fit; offset and growth in the unit of the quantity, no
    exponent where nothing grows."""
    rows = []
    for (axis, name, quantity), found in fits.items():
        sizes = [each["size"] for each in measured if (each["axis"], each["job"]) == (axis, name)]
        own, fitted = (
            OWN[axis, name, quantity],
            ("", "") if found.flat else (f"{found.exponent:.2f}", f"{found.error:.2f}"),
        )
        rows.append(
            {
                "case": name,
                "against": axis,
                "from": min(sizes),
                "to": max(sizes),
                "quantity": QUANTITIES[quantity],
                "offset": f"{found.offset:.3g}",
                "growth": f"{found.factor:.3g}",
                "exponent": fitted[0],
                "standard_error": fitted[1],
                "own_exponent": f"{own:g}",
                "grows_faster": verdict(found, own),
            }
        )
    return rows


def verdict(found: Fit, own: float) -> str:
    """Judge if a fit grows faster than the algorithm's own cost: ``yes``, ``no``, or ``undecided``
    where two standard errors reach down to it."""
    if found.flat or found.exponent <= own + TOLERANCE:
        return "no"
    return "yes" if found.exponent - 2 * found.error > own + TOLERANCE else "undecided"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "results" / "benchmarks-growth",
        help="name of the files less their suffixes",
    )
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as scratch:
        measured = list(measure(Path(scratch)))
    write_table(measured, output.with_name(f"{output.name}-data.csv"))
    fits = fits_of(measured)
    rows = table_of(fits, measured)
    write_table(rows, output.with_suffix(".csv"))

    # only now: what has to stay small while it measures does without matplotlib
    from growth_figure import plot

    from quantgrid.reporting.figures.study_figures import save

    save(plot(measured, fits, OWN, QUANTITIES), [output.with_suffix(suffix) for suffix in (".png", ".svg")])
    if faster := [row for row in rows if row["grows_faster"] == "yes"]:
        raise SystemExit(
            "\n".join(
                f"{row['case']}: {row['quantity']} grow with {row['against']} as size^{row['exponent']}, the own "
                f"cost as "
                f"size^{row['own_exponent']}"
                for row in faster
            )
        )


if __name__ == "__main__":
    main()
