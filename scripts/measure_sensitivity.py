"""Measure the mean squared gradients of the unmodified model, at the outputs of every linear and of every layer."""

from quantgrid.calibration.sensitivity import measure_sensitivities
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.corpora import token_windows
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.inference.linear import compute_device, compute_dtype
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder


def main() -> None:
    job = arguments("model", "windows", "sensitivities")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    device = compute_device(job.spec["compute"]["device"])
    model = streamed(FullPrecision(job.model, compute_dtype(job.spec["compute"]["dtype"], device), device))
    windows = token_windows.load(job.windows)[0][: job.spec["windows"]]
    about = {**record(job.spec, windows=job.windows), "windows": len(windows)}
    try:
        found = measure_sensitivities(
            model, windows, job.spec["seed"], job.spec["skip_first"], progress("measuring sensitivities")
        )
        write_json(
            job.sensitivities,
            {**about, "status": "ok", "linears": found.linears, "channels": found.channels.tolist()},
        )
    except NumericalFailure as failure:
        write_json(job.sensitivities, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
