"""Final hidden states of the unmodified model over a corpus: what divergences are measured from."""

from quantgrid import corpora
from quantgrid.allocator import fit_allocator
from quantgrid.architecture import shape_from_folder
from quantgrid.evaluation.perplexity import final_hidden
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.linear import compute_device, compute_dtype
from quantgrid.skeletons import attention_of
from quantgrid.streaming import FullPrecision, streamed
from quantgrid.tensor_files import write_each


def main() -> None:
    job = arguments("model", "windows", "reference")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    device = compute_device(job.spec["compute"]["device"])
    model = streamed(FullPrecision(job.model, compute_dtype(job.spec["compute"]["dtype"], device), device))
    windows, _ = corpora.load(job.windows)
    hidden = final_hidden(model, windows, job.spec["batch_size"], progress("layers"))
    write_each(job.reference, {"hidden": hidden}, {**record(job.spec, windows=job.windows), "attention": attention_of(model)})


if __name__ == "__main__":
    run(main)
