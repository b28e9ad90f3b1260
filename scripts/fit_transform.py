"""Fit a transform to a model: parameters only, nothing is folded yet."""

from quantgrid import registry
from quantgrid.cell_schemes import CellSchemes
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import NumericalFailure
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.storage import write_tensors
from quantgrid.transforms.composition import fit


def main() -> None:
    job = arguments("model", "statistics", "transform", optional=("statistics",))
    use_threads(job.spec)
    wanted = job.spec["transform"]
    given = {"seed": job.spec["seed"]} if "seed" in job.spec else {}
    if "schemes" in job.spec:  # of a transform that is fitted to what it serves
        given["schemes"] = CellSchemes.from_dict(job.spec["schemes"])
    primitives = registry.load("transforms", wanted["method"]).primitives(**wanted["options"], **given)
    about = record(job.spec, statistics=job.statistics)
    try:
        fitted = fit(primitives, DecoderFolder(job.model), job.statistics, progress("fitting layers"))
        fitted.save(job.transform, {**about, "status": "ok"})
    except NumericalFailure as failure:
        write_tensors(job.transform, {}, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
