"""Evaluate zero-shot tasks of a packed checkpoint with lm-eval; store the outcome of every
sample."""

from pathlib import Path

from quantgrid.corpora.tokenization import load_tokenizer
from quantgrid.evaluation.protocols import weights_of
from quantgrid.evaluation.tasks import evaluate
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.inference.linear import compute_device, compute_dtype
from quantgrid.jobs.job import arguments, record, run, use_threads
from quantgrid.models.skeletons import attention_of
from quantgrid.quantization.checkpoints import load_quantized


def measured(job) -> dict:
    device = compute_device(job.spec["compute"]["device"])
    model = load_quantized(Path(job.checkpoint).parent, compute_dtype(job.spec["compute"]["dtype"], device), device)
    settings = job.spec["evaluation"]
    found = evaluate(
        model,
        load_tokenizer(job.model),
        job.spec["tasks"],
        settings["task_limit"],
        settings["batch_size"],
        job.spec["seed"],
    )
    return {"status": "ok", "tasks": found, "attention": attention_of(model)}


def main() -> None:
    job = arguments("model", "checkpoint", "manifest", "result")
    use_threads(job.spec)
    about = {**record(job.spec, checkpoint=job.checkpoint), "model": weights_of(job.model)}
    try:
        write_json(job.result, {**about, **measured(job)})
    except NumericalFailure as failure:
        write_json(job.result, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
