"""Perplexity of a packed checkpoint and its divergence from full precision, loaded back from disk into a running model."""

from pathlib import Path

from quantgrid import corpora
from quantgrid.checkpoints import load_quantized
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import NumericalFailure
from quantgrid.evaluation.perplexity import evaluate
from quantgrid.evaluation.significance import perplexity
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.linear import compute_device, compute_dtype
from quantgrid.storage import read_tensors, write_json


def measured(job, windows) -> dict:
    device = compute_device(job.spec["compute"]["device"])
    dtype = compute_dtype(job.spec["compute"]["dtype"], device)
    model = load_quantized(Path(job.checkpoint).parent, dtype, device)
    ends = DecoderFolder(job.model).ends()
    head = ends.get("lm_head", ends["embedding"]).to(dtype)
    losses = evaluate(model, windows, read_tensors(job.reference)["hidden"], head, job.spec["batch_size"], progress("windows"))
    value, error = perplexity(losses["negative_log_likelihood"])
    return {"status": "ok", "perplexity": value, "stderr": error, "windows": losses}


def main() -> None:
    job = arguments("model", "checkpoint", "manifest", "windows", "reference", "result")
    use_threads(job.spec)
    windows, protocol = corpora.load(job.windows)
    about = {**record(job.spec, checkpoint=job.checkpoint, windows=job.windows, reference=job.reference), "protocol": protocol}
    try:
        write_json(job.result, {**about, **measured(job, windows)})
    except NumericalFailure as failure:
        write_json(job.result, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
