"""Measure the distributions of inputs and weights after folding a transform and before rounding."""

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.inference.linear import placement
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.learning import outcomes
from quantgrid.quantization.distributions import describe
from quantgrid.transforms.files import load_transform


def main() -> None:
    job = arguments("model", "transform", "statistics", "distribution")
    use_threads(job.spec)
    about = {
        **record(job.spec, transform=job.transform, statistics=job.statistics),
        "trainings": outcomes.of_transform(job.transform),
    }
    try:
        decoder = DecoderFolder(job.model, placement=placement(job.spec["compute"]))
        found = describe(decoder, load_transform(job.transform), job.statistics, progress("describing layers"))
        write_json(job.distribution, {**about, "status": "ok", **found})
    except NumericalFailure as failure:
        write_json(job.distribution, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
