"""Convert a model to canonical form: config.json, safetensors, tokenizer and provenance.json in one
folder."""

import os
import shutil
from pathlib import Path

from quantgrid.jobs.job import arguments, run
from quantgrid.models.fetch import fetch


def main() -> None:
    job = arguments("folder")
    folder = Path(job.folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        fetch(job.spec["model"], temporary, f"models.{job.spec['axes']['model']}")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    run(main)
