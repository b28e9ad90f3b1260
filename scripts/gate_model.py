"""Compare a model as quantgrid runs it with transformers' own before anything is quantized."""

from quantgrid.evaluation.gates import check_model, gate_tokens
from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json
from quantgrid.jobs.job import arguments, record, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder


def main() -> None:
    job = arguments("model", "windows", "result")
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    about = record(job.spec, windows=job.windows)
    tokens = gate_tokens(job.model, job.windows, job.spec["seed"])
    try:
        found = check_model(job.spec["axes"]["model"], job.model, tokens, job.spec["layers"])
    except NumericalFailure as failure:  # every cell of the model reports that
        write_json(job.result, {**about, "status": "failed", "reason": str(failure)})
        return
    write_json(job.result, {**about, "status": "ok", **found})


if __name__ == "__main__":
    run(main)
