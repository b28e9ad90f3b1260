"""Compute the final hidden states of the unmodified model over some windows of a corpus, the
reference for divergences."""

from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.corpora import token_windows
from quantgrid.evaluation.perplexity import final_hidden
from quantgrid.ground.tensor_files import write_each
from quantgrid.inference.linear import compute_device, compute_dtype
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.models.skeletons import attention_of


def main() -> None:
    job = arguments("model", "windows", "reference")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    device = compute_device(job.spec["compute"]["device"])
    model = streamed(FullPrecision(job.model, compute_dtype(job.spec["compute"]["dtype"], device), device))
    windows, _ = token_windows.load(job.windows, **job.spec["shard"])
    hidden = final_hidden(model, windows, job.spec["batch_size"], progress("layers"))
    write_each(
        job.reference, {"hidden": hidden}, {**record(job.spec, windows=job.windows), "attention": attention_of(model)}
    )


if __name__ == "__main__":
    run(main)
