"""Fold the transform, quantize every linear, write the packed checkpoint and the errors of its layers."""

from functools import partial
from importlib import import_module
from pathlib import Path

from quantgrid import trainings
from quantgrid.allocator import fit_allocator
from quantgrid.architecture import shape_from_folder
from quantgrid.cell_schemes import CellSchemes
from quantgrid.checkpoints import save_failed, save_quantized
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import NumericalFailure
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.linear import compute_device, compute_dtype
from quantgrid.quantization import Quantized, Recipe, quantize_decoder
from quantgrid.storage import write_json
from quantgrid.tensor_files import TensorSpool
from quantgrid.transforms.composition import Transform


def recipe(job) -> Recipe:
    schemes, wanted = CellSchemes.from_dict(job.spec["schemes"]), job.spec["mitigation"]
    module = import_module(f"quantgrid.{wanted['module']}")
    mitigation = partial(getattr(module, wanted["method"]), **wanted["options"]) if schemes.weight else None
    return Recipe(Transform.load(job.transform), schemes, mitigation, job.statistics)


def quantized(job) -> Quantized:
    """From cached statistics, or layer by layer with inputs from the quantized layers before; what is packed waits on disk until all is."""
    packed = TensorSpool(Path(job.checkpoint).parent)
    if "propagation" not in job.spec:
        return quantize_decoder(DecoderFolder(job.model), recipe(job), progress("quantizing linears"), packed)
    options = dict(job.spec["propagation"])
    sequential = import_module(f"quantgrid.{options.pop('module')}")  # no import statement: only cells that use it shall depend on it
    device = compute_device(job.spec["compute"]["device"])
    how = sequential.Sequential.load(job.windows, dtype=compute_dtype(job.spec["compute"]["dtype"], device), device=device, **options)
    return sequential.quantize_sequentially(DecoderFolder(job.model), recipe(job), how, progress("quantizing layers"), packed)


def main() -> None:
    job = arguments("model", "transform", "statistics", "windows", "checkpoint", "manifest", "error", optional=("statistics", "windows"))
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    about = record(job.spec, transform=job.transform, statistics=job.statistics, windows=job.windows)
    about["trainings"] = trainings.of_transform(job.transform)
    try:
        done = quantized(job)
        write_json(job.error, {**about, "status": "ok", "summary": done.summary(), "linears": done.errors,
                               "details": done.details, "choices": done.choices,
                               "propagation": "sequential" if "propagation" in job.spec else "cached"})
        save_quantized(done.content, job.checkpoint, job.manifest, about)
    except NumericalFailure as failure:
        write_json(job.error, {**about, "status": "failed", "reason": str(failure)})
        save_failed(job.checkpoint, job.manifest, about, str(failure))


if __name__ == "__main__":
    run(main)
