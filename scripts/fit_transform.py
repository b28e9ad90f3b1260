"""Fit a transform to a model, and train it if it is a learned one: parameters only, nothing is folded yet."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from quantgrid.allocator import fit_allocator
from quantgrid.architecture import shape_from_folder
from quantgrid.cell_schemes import CellSchemes
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import NumericalFailure
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.storage import write_tensors, write_text
from quantgrid.transforms.composition import Transform, fit
from quantgrid.workplace import Workplace

LOSSES = "part,step,loss,learning_rate\n"


def trained(module: ModuleType, start: Transform, job: Any, given: dict[str, Any]) -> tuple[Transform, str, dict[str, Any]]:
    """The learned transform, its losses as CSV, and for each part what it started from, came to, and which of the two is kept."""
    windows = Path(job.windows) if job.windows else None
    place = Workplace(Path(job.model), windows, job.spec["compute"]["device"], Path(job.transform).with_name("training.safetensors"),
                      progress("learning"))
    learned = module.learn(start, place, **given)
    for part, end in learned.ends.items():
        print(f"part {part}: loss {end['start']:.6g} at the start, {end['end']:.6g} at the end; {end['kept']} parameters kept")
    return learned.transform, learned.losses, {"learning": learned.ends}


def main() -> None:
    job = arguments("model", "statistics", "windows", "transform", "losses", optional=("statistics", "windows"))
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    wanted = job.spec["transform"]
    given = {**wanted["options"], **({"seed": job.spec["seed"]} if "seed" in job.spec else {})}
    if "schemes" in job.spec:  # of a transform that is fitted to what it serves
        given["schemes"] = CellSchemes.from_dict(job.spec["schemes"])
    module = import_module(f"quantgrid.{wanted['module']}")
    about, losses = record(job.spec, statistics=job.statistics, windows=job.windows), LOSSES
    try:
        fitted = fit(module.primitives(**given), DecoderFolder(job.model), job.statistics, progress("fitting layers"))
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
