"""Give every group of linears the scheme with which the predicted divergence of the model is smallest
within a number of stored bits."""

from typing import Any

from quantgrid.ground.errors import NumericalFailure
from quantgrid.ground.storage import read_json, write_json
from quantgrid.jobs.job import arguments, record, run
from quantgrid.models.shapes import shape_from_folder
from quantgrid.quantization.allocation import Table, allocate, front
from quantgrid.quantization.linear_groups import linear_groups


def read(path: str) -> dict[str, Any]:
    """Content of a JSON file; :class:`NumericalFailure` if the job that wrote it failed."""
    found = read_json(path)
    if found["status"] == "failed":
        raise NumericalFailure(found["reason"])
    return found


def main() -> None:
    job = arguments("model", "sensitivities", "errors", "allocation")
    wanted = job.spec["allocate"]
    about = {**record(job.spec, sensitivities=job.sensitivities, errors=job.errors), "allocate": wanted}
    try:
        groups = linear_groups(shape_from_folder(job.model), wanted["groups"])
        table = Table.of(read(job.errors), read(job.sensitivities)["linears"], groups)
        found = allocate(table, wanted["budget"], wanted["divergence"], wanted["alternatives"])
        uniform = {name: table.described(choice) for name, choice in table.uniform().items()}
        for entry in uniform.values():
            del entry["schemes"]
        write_json(
            job.allocation,
            {
                **about,
                "status": "ok",
                "allocations": [table.described(choice) for choice in found],
                "uniform": uniform,
                "front": front(table),
            },
        )
    except NumericalFailure as failure:
        write_json(job.allocation, {**about, "status": "failed", "reason": str(failure)})


if __name__ == "__main__":
    run(main)
