"""Fold the transform, quantize every linear, write the packed checkpoint and the errors of its layers."""

from functools import partial

from quantgrid import registry
from quantgrid.cell_schemes import CellSchemes
from quantgrid.checkpoints import save_failed, save_quantized
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import NumericalFailure
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.quantization import Recipe, quantize_decoder, summarize
from quantgrid.storage import write_json
from quantgrid.transforms.composition import Transform


def recipe(job) -> Recipe:
    schemes, wanted = CellSchemes.from_dict(job.spec["schemes"]), job.spec["mitigation"]
    module = registry.load("mitigations", wanted["method"])
    mitigation = partial(getattr(module, wanted["method"]), **wanted["options"]) if schemes.weight else None
    return Recipe(Transform.load(job.transform), schemes, mitigation, job.statistics)


def main() -> None:
    job = arguments("model", "transform", "statistics", "checkpoint", "manifest", "error", optional=("statistics",))
    use_threads(job.spec)
    about = record(job.spec, transform=job.transform, statistics=job.statistics)
    try:
        done = quantize_decoder(DecoderFolder(job.model), recipe(job), progress("quantizing linears"))
        write_json(job.error, {**about, "status": "ok", "summary": {**summarize(done.errors), **done.costs}, "linears": done.errors,
                               "details": done.details, "choices": done.choices})
        save_quantized(done.content, job.checkpoint, job.manifest, about)
    except NumericalFailure as failure:
        write_json(job.error, {**about, "status": "failed", "reason": str(failure)})
        save_failed(job.checkpoint, job.manifest, about, str(failure))


if __name__ == "__main__":
    run(main)
