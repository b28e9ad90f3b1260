"""Quantize a cell and evaluate it on the first windows of a race, without keeping its checkpoint.

Runs the scripts of both rules on a checkpoint in a temporary folder.
"""

import runpy
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantgrid.ground.places import SCRIPTS
from quantgrid.ground.provenance import canonical
from quantgrid.jobs.job import CELL_INPUTS, OPTIONAL_CELL_INPUTS, arguments, run


@contextmanager
def scratch(result: Path, key: str) -> Iterator[Path]:
    """Folder for the checkpoint, next to ``result``; those of killed jobs of this step are deleted."""
    result.parent.mkdir(parents=True, exist_ok=True)
    for left in result.parent.glob(f".{key}.*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=result.parent, prefix=f".{key}.") as folder:
        yield Path(folder)


def start(rule: str, spec: dict, files: dict[str, str | None]) -> None:
    """Run the script of ``rule`` in this process; files of None are inputs that it does without."""
    sys.argv = [str(SCRIPTS / f"{rule}.py"), "--spec", canonical(spec)]
    for name, path in files.items():
        sys.argv += [f"--{name}", *([path] if path else [])]
    runpy.run_path(sys.argv[0], run_name="__main__")


def screen(job: Namespace, folder: Path) -> None:
    """Quantize and evaluate; both results have the axes of this job, whose outputs they are."""
    packed = {"checkpoint": str(folder / "model.safetensors"), "manifest": str(folder / "quantgrid.json")}
    read = {name: getattr(job, name) for name in CELL_INPUTS}
    evaluated = {"model": job.model, **packed, "windows": job.evaluated, "reference": job.reference}
    for rule, files in (
        ("quantize_model", {**read, **packed, "error": job.error}),
        ("evaluate_perplexity", {**evaluated, "result": job.result}),
    ):
        start(rule, {**job.spec[rule], "axes": job.spec["axes"]}, files)


def main() -> None:
    job = arguments(*CELL_INPUTS, "evaluated", "reference", "result", "error", optional=OPTIONAL_CELL_INPUTS)
    with scratch(Path(job.result), job.spec["axes"]["key"]) as folder:
        screen(job, folder)


if __name__ == "__main__":
    run(main)
