"""Measure the loss of a packed checkpoint, loaded from disk into a running model, and its divergence
from full precision on some windows of a corpus."""

from pathlib import Path

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.streaming import streamed
from quantgrid.corpora import token_windows
from quantgrid.evaluation import protocols
from quantgrid.evaluation.perplexity import evaluate
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import read_tensors, write_json
from quantgrid.inference.linear import compute_device, compute_dtype
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.models.skeletons import attention_of
from quantgrid.quantization.checkpoints import PackedCheckpoint


def measured(job, windows, dtype, device) -> dict:
    model, reference = (
        streamed(PackedCheckpoint(Path(job.checkpoint).parent, dtype, device)),
        read_tensors(job.reference)["hidden"],
    )
    losses = evaluate(
        model,
        windows,
        reference,
        lambda: DecoderFolder(job.model).head(dtype),
        job.spec["batch_size"],
        progress("layers"),
        job.spec["shard"]["start"],
    )
    return {"status": "ok", "windows": losses, "attention": attention_of(model)}


def main() -> None:
    job = arguments("model", "checkpoint", "manifest", "windows", "reference", "result")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    windows, corpus = token_windows.load(job.windows, **job.spec["shard"])
    device = compute_device(job.spec["compute"]["device"])
    dtype = compute_dtype(job.spec["compute"]["dtype"], device)
    about = {
        **record(job.spec, checkpoint=job.checkpoint, windows=job.windows, reference=job.reference),
        "corpus": corpus,
        "model": protocols.weights_of(job.model),
        "dtype": str(dtype).removeprefix("torch."),
    }
    try:
        write_json(job.result, {**about, **measured(job, windows, dtype, device)})
    except NumericalFailure as failure:
        write_json(job.result, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
