"""Fold the transform, quantize every linear, write the packed checkpoint and the errors of its
layers."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.storage import blake3_of, read_json, write_json
from quantgrid.ground.tensor_files import TensorSpool
from quantgrid.inference.linear import compute_dtype, placement
from quantgrid.jobs.job import CELL_INPUTS, OPTIONAL_CELL_INPUTS, arguments, progress, record, run, use_threads
from quantgrid.learning import outcomes
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.shapes import shape_from_folder
from quantgrid.quantization.cached import Quantized, Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import save_failed, save_quantized
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform


def allocation(job) -> dict[str, Any]:
    """Allocation of an allocated cell, with what it predicts; empty for other cells."""
    if "rank" not in job.spec:
        return {}
    if not job.allocation:
        raise ConfigError("allocation: this cell takes its schemes from an allocation, and no file of one is given")
    found, rank = read_json(job.allocation), job.spec["rank"]
    if found["status"] == "failed":
        raise NumericalFailure(found["reason"])
    if rank > len(found["allocations"]):
        raise NumericalFailure(
            f"only {len(found['allocations'])} allocations are within the limit; this is number {rank}"
        )
    own = found["allocations"][rank - 1]
    return {**own, **{name: found[name] for name in ("allocate", "uniform", "front")}, "rank": rank}


def recipe(job, chosen: Mapping[str, str]) -> Recipe:
    schemes, wanted = CellSchemes.from_dict(job.spec["schemes"]).allocated(chosen), job.spec["mitigation"]
    module = import_module(f"quantgrid.{job.spec['modules']['mitigation']}")
    mitigation = partial(getattr(module, wanted["method"]), **wanted["options"]) if schemes.weights else None
    return Recipe(load_transform(job.transform), schemes, mitigation, job.statistics)


def fingerprint(job, about) -> dict:
    """Everything that decides the result: the specification, which has the digest of the code, the
    device and dtypes, and the digests of the inputs; that of the model's provenance, which has those of
    its weights."""
    place = placement(job.spec["compute"])
    return {
        "spec": job.spec,
        "placement": {**place.to_dict(), "dtype": str(compute_dtype(job.spec["compute"]["dtype"], place.device))},
        "inputs": about["inputs"],
        "model": blake3_of(Path(job.model, "provenance.json")),
    }


def quantized(job, about, chosen: Mapping[str, str]) -> Quantized:
    """Quantize from cached statistics, or sequentially, with each layer's inputs taken from the
    quantized layers before it. Packed layers are stored on disk until all are done; sequentially,
    an interrupted job goes on behind the last of them."""
    folder, place = Path(job.checkpoint).parent, placement(job.spec["compute"])
    decoder = DecoderFolder(job.model, placement=place)
    if "propagation" not in job.spec:
        return quantize_decoder(decoder, recipe(job, chosen), progress("quantizing linears"), TensorSpool(folder))
    sequential = import_module(
        f"quantgrid.{job.spec['modules']['propagation']}"
    )  # not an import statement, so that only cells that use it depend on it
    dtype = compute_dtype(job.spec["compute"]["dtype"], place.device)
    how = sequential.Sequential.load(job.windows, dtype=dtype, device=place.device, **job.spec["propagation"])
    state = sequential.SequentialState(folder, fingerprint(job, about))
    return sequential.quantize_sequentially(decoder, recipe(job, chosen), how, progress("quantizing layers"), state)


def main() -> None:
    job = arguments(*CELL_INPUTS, "checkpoint", "manifest", "error", optional=OPTIONAL_CELL_INPUTS)
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    about = record(job.spec, **{name: getattr(job, name) for name in CELL_INPUTS if name != "model"})
    about["trainings"] = outcomes.of_transform(job.transform)
    about["placement"] = placement(job.spec["compute"]).to_dict()
    try:
        bits = allocation(job)
        done = quantized(job, about, bits.get("schemes", {}))
        predicted = {"predicted_kl_divergence": bits["predicted_kl"]} if bits else {}
        write_json(
            job.error,
            {
                **about,
                "status": "ok",
                "summary": {**done.summary(), **predicted},
                "linears": done.errors,
                "details": done.details,
                "choices": done.choices,
                "propagation": "sequential" if "propagation" in job.spec else "cached",
                **({"allocation": bits} if bits else {}),
            },
        )
        save_quantized(done.content, job.checkpoint, job.manifest, about)
    except NumericalFailure as failure:
        write_json(job.error, {**about, "status": "failed", "reason": str(failure)})
        save_failed(job.checkpoint, job.manifest, about, str(failure))
    for left in Path(job.checkpoint).parent.glob("sequential.*"):  # the state of a sequential quantization
        left.unlink()


if __name__ == "__main__":
    run(main)
