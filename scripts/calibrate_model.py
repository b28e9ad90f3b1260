"""Collect the statistics of every site of the unmodified model over the calibration windows."""

from collections.abc import Callable

from torch import Tensor

from quantgrid.calibration.collect import collect_layers, kept_tensors
from quantgrid.calibration.statistics import SiteStatistics, to_tensors
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.corpora import token_windows
from quantgrid.ground.tensor_files import writing
from quantgrid.inference.linear import compute_device, compute_dtype
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.models.skeletons import attention_of


def store(found: dict[str, SiteStatistics], put: Callable[[str, Tensor], None]) -> None:
    """Write the statistics of one layer and free each as soon as it is written."""
    while found:
        for name, tensor in to_tensors(*found.popitem()).items():
            put(name, tensor)


def half_of(windows: Tensor, half: str) -> Tensor:
    """The ``first`` or ``second`` half of the windows, or all of them."""
    middle = len(windows) // 2
    return {"": windows, "first": windows[:middle], "second": windows[middle:]}[half]


def main() -> None:
    job = arguments("model", "windows", "statistics")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    device = compute_device(job.spec["compute"]["device"])
    model = streamed(FullPrecision(job.model, compute_dtype(job.spec["compute"]["dtype"], device), device))
    windows = half_of(token_windows.load(job.windows)[0], job.spec.get("half", ""))
    samples, seed, skip_first = job.spec["samples"], job.spec["seed"], job.spec["skip_first"]
    everyone = job.spec["experts"] == "all"
    announced = kept_tensors(shape_from_folder(job.model), windows, samples, seed, skip_first)
    with writing(
        job.statistics, announced, {**record(job.spec, windows=job.windows), "attention": attention_of(model)}
    ) as put:
        for found in collect_layers(
            model, windows, samples, seed, progress("calibrating layers"), skip_first, everyone
        ):
            store(found, put)


if __name__ == "__main__":
    run(main)
