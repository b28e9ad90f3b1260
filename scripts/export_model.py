"""Export of one cell to a format that other programs load, with a card and a check."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantgrid.exports.export import export
from quantgrid.ground.storage import read_json, settle
from quantgrid.jobs.job import arguments, run, use_threads
from quantgrid.machine.malloc import fit_allocator
from quantgrid.models.model_cards import card_metadata
from quantgrid.models.shapes import shape_from_folder


def results(measured: str | None, baseline: str | None, corpus: str) -> Iterator[dict[str, Any]]:
    """Rows of the card: perplexity of the cell with that of full precision; none if either failed."""
    if not measured or not baseline:
        return
    cell, full = read_json(measured), read_json(baseline)
    if cell["status"] == full["status"] == "ok":
        yield {
            "metric": "perplexity",
            "corpus": corpus,
            "value": cell["perplexity"],
            "stderr": cell["stderr"],
            "full_precision": full["perplexity"],
            "protocol": protocol_text(cell["protocol"]),
        }


def known(
    planned: dict[str, Any], model: str, measured: str | None = None, baseline: str | None = None
) -> dict[str, Any]:
    """The facts for the card: those of the plan, license and language of the model, perplexities."""
    return {**planned, **card_metadata(model), "results": list(results(measured, baseline, planned["corpus"]))}


def protocol_text(protocol: dict[str, Any]) -> str:
    """Protocol of a perplexity in one cell of a table; the results of the run have all of it."""
    count = f", {protocol['windows']} of them" if protocol.get("windows") else ""
    return f"{protocol['name']}{count}, {protocol['dtype']}"


def main() -> None:
    job = arguments(
        "model",
        "checkpoint",
        "manifest",
        "windows",
        "measured",
        "baseline",
        "folder",
        optional=("measured", "baseline"),
    )
    use_threads(job.spec)
    fit_allocator(shape_from_folder(job.model))
    settle(job.checkpoint)
    wanted = job.spec
    about = known(wanted["about"], job.model, job.measured, job.baseline)
    shutil.rmtree(job.folder, ignore_errors=True)  # of a job that was killed
    found = export(
        job.model,
        Path(job.checkpoint).parent,
        job.manifest,
        job.windows,
        wanted["to"],
        job.folder,
        wanted["flags"],
        about,
    )
    checked = found["check"]
    print(f"{found['verdict']['kind']}; {checked['loader']}: KL {checked['kl']:.2g} nats per token to the cell")


if __name__ == "__main__":
    run(main)
