"""Take the statistics of every site of the unmodified model over the calibration windows."""

from quantgrid import corpora
from quantgrid.calibration import collect
from quantgrid.checkpoints import load_full_precision
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.linear import compute_device, compute_dtype
from quantgrid.statistics import to_tensors
from quantgrid.storage import write_tensors


def main() -> None:
    job = arguments("model", "windows", "statistics")
    use_threads(job.spec)
    device = compute_device(job.spec["compute"]["device"])
    model = load_full_precision(job.model, compute_dtype(job.spec["compute"]["dtype"], device), device)
    windows, _ = corpora.load(job.windows)
    found = collect(model, windows, job.spec["samples"], job.spec["seed"], progress("calibrating layers"))
    tensors = {name: tensor for site, statistics in found.items() for name, tensor in to_tensors(site, statistics).items()}
    write_tensors(job.statistics, tensors, record(job.spec, windows=job.windows))


if __name__ == "__main__":
    run(main)
