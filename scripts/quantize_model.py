"""Fold the transform, quantize every linear, write the packed checkpoint and the errors of its
layers."""

from functools import partial
from importlib import import_module
from pathlib import Path

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import blake3_of, write_json
from quantgrid.ground.tensor_files import TensorSpool
from quantgrid.inference.linear import compute_device, compute_dtype
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


def fingerprint(job, about) -> dict:
    """Everything that decides the result: the specification, which has the digest of the code, and
    the digests of the inputs; that of the model's provenance, which has those of its weights."""
    return {"spec": job.spec, "inputs": about["inputs"], "model": blake3_of(Path(job.model, "provenance.json"))}


def quantized(job, about) -> Quantized:
    """Quantize from cached statistics, or sequentially, with each layer's inputs taken from the
    quantized layers before it. Packed layers are stored on disk until all are done; sequentially,
    an interrupted job goes on behind the last of them."""
    folder = Path(job.checkpoint).parent
    if "propagation" not in job.spec:
        packed = TensorSpool(folder)
        return quantize_decoder(DecoderFolder(job.model), recipe(job), progress("quantizing linears"), packed)
    sequential = import_module(
        f"quantgrid.{job.spec['modules']['propagation']}"
    )  # not an import statement, so that only cells that use it depend on it
    device = compute_device(job.spec["compute"]["device"])
    how = sequential.Sequential.load(
        job.windows, dtype=compute_dtype(job.spec["compute"]["dtype"], device), device=device, **job.spec["propagation"]
    )
    state = sequential.SequentialState(folder, fingerprint(job, about))
    return sequential.quantize_sequentially(
        DecoderFolder(job.model), recipe(job), how, progress("quantizing layers"), state
    )


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
    try:
        done = quantized(job, about)
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
    for left in Path(job.checkpoint).parent.glob("sequential.*"):  # the state of a sequential quantization
        left.unlink()


if __name__ == "__main__":
    run(main)
