"""Fold the transform, quantize every linear, write the packed checkpoint and the errors of its
layers."""

from functools import partial
from importlib import import_module
from pathlib import Path

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.ground.tensor_files import TensorSpool
from quantgrid.inference.linear import compute_dtype, placement
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.learning import outcomes
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.quantization.cached import Quantized, Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import save_failed, save_quantized
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform


def recipe(job) -> Recipe:
    schemes, wanted = CellSchemes.from_dict(job.spec["schemes"]), job.spec["mitigation"]
    module = import_module(f"quantgrid.{job.spec['modules']['mitigation']}")
    mitigation = partial(getattr(module, wanted["method"]), **wanted["options"]) if schemes.weight else None
    return Recipe(load_transform(job.transform), schemes, mitigation, job.statistics)


def quantized(job) -> Quantized:
    """Quantize from cached statistics, or sequentially, with each layer's inputs taken from the
    quantized layers before it. Packed layers are stored on disk until all are done."""
    packed, place = TensorSpool(Path(job.checkpoint).parent), placement(job.spec["compute"])
    decoder = DecoderFolder(job.model, placement=place)
    if "propagation" not in job.spec:
        return quantize_decoder(decoder, recipe(job), progress("quantizing linears"), packed)
    sequential = import_module(
        f"quantgrid.{job.spec['modules']['propagation']}"
    )  # not an import statement, so that only cells that use it depend on it
    dtype = compute_dtype(job.spec["compute"]["dtype"], place.device)
    how = sequential.Sequential.load(job.windows, dtype=dtype, device=place.device, **job.spec["propagation"])
    return sequential.quantize_sequentially(decoder, recipe(job), how, progress("quantizing layers"), packed)


def main() -> None:
    job = arguments(
        "model",
        "transform",
        "statistics",
        "windows",
        "checkpoint",
        "manifest",
        "error",
        optional=("statistics", "windows"),
    )
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    about = record(job.spec, transform=job.transform, statistics=job.statistics, windows=job.windows)
    about["trainings"] = outcomes.of_transform(job.transform)
    about["placement"] = placement(job.spec["compute"]).to_dict()
    try:
        done = quantized(job)
        write_json(
            job.error,
            {
                **about,
                "status": "ok",
                "summary": done.summary(),
                "linears": done.errors,
                "details": done.details,
                "choices": done.choices,
                "propagation": "sequential" if "propagation" in job.spec else "cached",
            },
        )
        save_quantized(done.content, job.checkpoint, job.manifest, about)
    except NumericalFailure as failure:
        write_json(job.error, {**about, "status": "failed", "reason": str(failure)})
        save_failed(job.checkpoint, job.manifest, about, str(failure))


if __name__ == "__main__":
    run(main)
