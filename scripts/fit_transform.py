"""Fit a transform to a model, and train it if it is learned; writes parameters only and folds
nothing."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_tensors, write_text
from quantgrid.inference.linear import placement
from quantgrid.inference.transform import Transform, fit
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.learning.loss_columns import HEADER
from quantgrid.learning.training_context import TrainingContext
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.schemes.cell_schemes import CellSchemes


def trained(
    module: ModuleType, start: Transform, job: Any, given: dict[str, Any]
) -> tuple[Transform, str, dict[str, Any]]:
    """Train a learned transform: its parameters, its losses as CSV, and per part the loss at the
    start, at the end, and the parameters kept."""
    windows = Path(job.windows) if job.windows else None
    context = TrainingContext(
        Path(job.model),
        windows,
        job.spec["compute"]["device"],
        Path(job.transform).with_name("training.safetensors"),
        progress("learning"),
        statistics_file=Path(job.statistics) if job.statistics else None,
    )
    learned = module.learn(start, context, **given)
    for part, end in learned.ends.items():
        print(
            f"part {part}: loss {end['start']:.6g} at the start, {end['end']:.6g} at the end; "
            f"{end['kept']} parameters kept"
        )
    return learned.transform, learned.losses, {"learning": learned.ends}


def main() -> None:
    job = arguments("model", "statistics", "windows", "transform", "losses", optional=("statistics", "windows"))
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    wanted = job.spec["transform"]
    given = {**wanted["options"], **({"seed": job.spec["seed"]} if "seed" in job.spec else {})}
    if "schemes" in job.spec:  # only transforms fitted to a scheme have it
        given["schemes"] = CellSchemes.from_dict(job.spec["schemes"])
    module = import_module(f"quantgrid.{job.spec['modules']['transform']}")
    about, losses = record(job.spec, statistics=job.statistics, windows=job.windows), HEADER
    try:
        decoder = DecoderFolder(job.model, placement=placement(job.spec["compute"]))
        fitted = fit(module.primitives(**given), decoder, job.statistics, progress("fitting layers"))
        if wanted["learned"]:
            fitted, losses, ends = trained(module, fitted, job, given)
            about |= ends
        fitted.save(job.transform, {**about, "status": "ok"})
    except NumericalFailure as failure:
        write_tensors(job.transform, {}, {**about, "status": "failed", "reason": str(failure)})
    write_text(job.losses, losses)
    Path(job.transform).with_name("training.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
