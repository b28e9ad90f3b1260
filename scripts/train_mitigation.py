"""Quantize a model with a trained mitigation: fold the transform, train on token windows, write the
packed checkpoint, errors and losses."""

from importlib import import_module
from pathlib import Path

from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import write_json, write_text
from quantgrid.inference.linear import placement
from quantgrid.jobs.job import arguments, progress, record, run, use_threads
from quantgrid.learning import outcomes
from quantgrid.learning.loss_columns import HEADER
from quantgrid.learning.training_context import TrainingContext
from quantgrid.quantization.cached import Recipe
from quantgrid.quantization.checkpoints import save_failed, save_quantized
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform


def main() -> None:
    job = arguments(
        "model",
        "transform",
        "statistics",
        "windows",
        "sensitivities",
        "checkpoint",
        "manifest",
        "losses",
        "error",
        optional=("sensitivities",),
    )
    use_threads(job.spec)
    read = ("transform", "statistics", "windows", "sensitivities")
    about = record(job.spec, **{name: getattr(job, name) for name in read})
    about["trainings"] = outcomes.of_transform(job.transform)
    about["placement"] = placement(job.spec["compute"]).to_dict()
    wanted, losses = job.spec["mitigation"], HEADER
    train = getattr(import_module(f"quantgrid.{job.spec['modules']['mitigation']}"), wanted["method"])
    state = Path(job.checkpoint).with_name("training.safetensors")
    compute = job.spec["compute"]
    context = TrainingContext(
        Path(job.model),
        Path(job.windows),
        compute["device"],
        state,
        progress("training"),
        solver_dtype=compute["solver_dtype"],
        sensitivities_file=Path(job.sensitivities) if job.sensitivities else None,
    )
    try:
        recipe = Recipe(load_transform(job.transform), CellSchemes.from_dict(job.spec["schemes"]), None, job.statistics)
        trained = train(recipe, context, seed=job.spec["seed"], **wanted["options"])
        done, losses = trained.quantized, trained.losses
        about["trainings"]["mitigation"] = trained.ends
        summary = {**done.summary(), "training_steps": wanted["options"]["steps"]}
        write_json(
            job.error,
            {
                **about,
                "status": "ok",
                "summary": summary,
                "linears": done.errors,
                "details": done.details,
                "choices": done.choices,
                "training": job.spec["training"],
            },
        )
        save_quantized(done.content, job.checkpoint, job.manifest, about)
    except NumericalFailure as failure:
        write_json(job.error, {**about, "status": "failed", "reason": str(failure)})
        save_failed(job.checkpoint, job.manifest, about, str(failure))
    write_text(job.losses, losses)
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
