"""Measure the output error of every linear under every candidate scheme of an allocation."""

from functools import partial
from importlib import import_module

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.inference.linear import placement
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.quantization.cached import Recipe
from quantgrid.quantization.scheme_errors import scheme_errors
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform


def main() -> None:
    job = arguments("model", "transform", "statistics", "held_out", "errors", optional=("held_out",))
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    wanted = job.spec["mitigation"]
    module = import_module(f"quantgrid.{job.spec['modules']['mitigation']}")
    mitigation = partial(getattr(module, wanted["method"]), **wanted["options"])
    about = record(job.spec, transform=job.transform, statistics=job.statistics, held_out=job.held_out)
    try:
        recipe = Recipe(
            load_transform(job.transform), CellSchemes.from_dict(job.spec["schemes"]), mitigation, job.statistics
        )
        found = scheme_errors(
            DecoderFolder(job.model, placement=placement(job.spec["compute"])),
            recipe,
            job.held_out or None,
            progress("solving linears"),
        )
        write_json(job.errors, {**about, "status": "ok", **found})
    except NumericalFailure as failure:
        write_json(job.errors, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
