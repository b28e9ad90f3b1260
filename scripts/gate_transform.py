"""Compare a transformed, unrounded model with the model before anything is quantized."""

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.evaluation.gates import check_transform, gate_tokens
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.transforms.files import load_transform


def main() -> None:
    job = arguments("model", "transform", "windows", "result")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    axes, about = job.spec["axes"], record(job.spec, transform=job.transform, windows=job.windows)
    tokens, decoder = gate_tokens(job.model, job.windows, job.spec["seed"]), DecoderFolder(job.model)
    try:
        transform = load_transform(job.transform)
        found = check_transform(axes["model"], axes["transform"], decoder, transform, tokens, progress("layers"))
    except NumericalFailure as failure:  # every cell of the model or of the transform reports that
        write_json(job.result, {**about, "status": "failed", "reason": str(failure)})
        return
    write_json(job.result, {**about, "status": "ok", **found})


if __name__ == "__main__":
    run(main)
