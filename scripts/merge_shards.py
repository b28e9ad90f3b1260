"""Merge the shards of an evaluation into its perplexity, its divergence and their errors."""

from quantgrid.evaluation.shards import merged
from quantgrid.ground.storage import read_json, write_json
from quantgrid.jobs.job import arguments, run


def main() -> None:
    job = arguments("shards", "result", several=("shards",))
    found = merged([read_json(path) for path in job.shards], job.spec["windows"])
    write_json(job.result, {"axes": job.spec["axes"], **found})


if __name__ == "__main__":
    run(main)
