"""Fold the transform, quantize every linear, write the packed checkpoint and the errors of its layers."""

from functools import partial

from quantgrid import registry
from quantgrid.checkpoints import save_failed, save_quantized
from quantgrid.decoders import DecoderFolder
from quantgrid.errors import NumericalFailure
from quantgrid.job import arguments, progress, record, run, use_threads
from quantgrid.key_values import KeyValueScheme
from quantgrid.quantization import Recipe, quantize_decoder, summarize
from quantgrid.quantizer import QuantScheme
from quantgrid.storage import write_json
from quantgrid.transforms.composition import Transform


def recipe(job) -> Recipe:
    schemes, wanted = job.spec["schemes"], job.spec["mitigation"]
    weight = QuantScheme.from_dict(schemes["weight"]) if schemes["weight"] else None
    activation = {site: [QuantScheme.from_dict(fields) for fields in candidates] for site, candidates in schemes["activation"].items()}
    key_value = KeyValueScheme.from_dict(schemes["key_value"]) if schemes["key_value"] else None
    module = registry.load("mitigations", wanted["method"])
    mitigation = partial(getattr(module, wanted["method"]), **wanted["options"]) if weight else None
    return Recipe(Transform.load(job.transform), weight, activation, mitigation, job.statistics, key_value)


def main() -> None:
    job = arguments("model", "transform", "statistics", "checkpoint", "manifest", "error", optional=("statistics",))
    use_threads(job.spec)
    about = record(job.spec, transform=job.transform, statistics=job.statistics)
    try:
        done = quantize_decoder(DecoderFolder(job.model), recipe(job), progress("quantizing linears"))
        write_json(job.error, {**about, "status": "ok", "summary": summarize(done.errors), "linears": done.errors, "details": done.details,
                               "choices": done.choices})
        save_quantized(done.content, job.checkpoint, job.manifest, about)
    except NumericalFailure as failure:
        write_json(job.error, {**about, "status": "failed", "reason": str(failure)})
        save_failed(job.checkpoint, job.manifest, about, str(failure))


if __name__ == "__main__":
    run(main)
