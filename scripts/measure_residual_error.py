"""Measure the error of the residual stream after each layer of a packed checkpoint, relative to the
unmodified model."""

from pathlib import Path

from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.corpora import token_windows
from quantgrid.evaluation.residual_error import error_growth, residual_basis
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import read_json, write_json
from quantgrid.inference.linear import compute_device, compute_dtype
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.models.skeletons import attention_of
from quantgrid.quantization.checkpoints import PackedCheckpoint
from quantgrid.transforms.files import load_transform


def measured(job, windows) -> dict:
    device = compute_device(job.spec["compute"]["device"])
    dtype = compute_dtype(job.spec["compute"]["dtype"], device)
    model = streamed(PackedCheckpoint(Path(job.checkpoint).parent, dtype, device))
    basis = residual_basis(load_transform(job.transform), shape_from_folder(job.model))
    original = streamed(FullPrecision(job.model, dtype, device))
    return {
        "status": "ok",
        "layers": error_growth(model, original, windows, basis, progress("layers")),
        "attention": attention_of(model),
    }


def main() -> None:
    job = arguments("model", "transform", "checkpoint", "manifest", "windows", "result")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    windows, corpus = token_windows.load(job.windows)
    windows = windows[: job.spec["windows"]]
    about = {
        **record(job.spec, checkpoint=job.checkpoint, windows=job.windows),
        "corpus": corpus,
        "windows": len(windows),
        "trainings": read_json(job.manifest)["trainings"],
    }
    try:
        write_json(job.result, {**about, **measured(job, windows)})
    except NumericalFailure as failure:
        write_json(job.result, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
