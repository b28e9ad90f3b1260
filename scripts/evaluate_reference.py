"""Final hidden states of the unmodified model over a corpus: what divergences are measured from."""

from quantgrid import corpora
from quantgrid.checkpoints import load_full_precision
from quantgrid.evaluation.perplexity import final_hidden
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.linear import compute_device, compute_dtype
from quantgrid.storage import write_tensors


def main() -> None:
    job = arguments("model", "windows", "reference")
    use_threads(job.spec)
    device = compute_device(job.spec["compute"]["device"])
    model = load_full_precision(job.model, compute_dtype(job.spec["compute"]["dtype"], device), device)
    windows, _ = corpora.load(job.windows)
    hidden = final_hidden(model, windows, job.spec["batch_size"], progress("windows"))
    write_tensors(job.reference, {"hidden": hidden}, record(job.spec, windows=job.windows))


if __name__ == "__main__":
    run(main)
