"""Describe how inputs and weights are distributed once a transform is folded in, before anything is rounded."""

from quantgrid import trainings
from quantgrid.decoders import DecoderFolder
from quantgrid.distributions import describe
from quantgrid.errors import NumericalFailure
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.storage import write_json
from quantgrid.transforms.composition import Transform


def main() -> None:
    job = arguments("model", "transform", "statistics", "distribution")
    use_threads(job.spec)
    about = {**record(job.spec, transform=job.transform, statistics=job.statistics), "trainings": trainings.of_transform(job.transform)}
    try:
        found = describe(DecoderFolder(job.model), Transform.load(job.transform), job.statistics, progress("describing layers"))
        write_json(job.distribution, {**about, "status": "ok", **found})
    except NumericalFailure as failure:
        write_json(job.distribution, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
