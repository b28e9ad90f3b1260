"""Start-up of the workflow's scripts: arguments, threads, progress bar, and the provenance record
of a result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError
from ..ground.provenance import versions
from ..ground.storage import blake3_of, verified

# inputs of a job that quantizes a cell; none but the first two are those of every cell
CELL_INPUTS = ("model", "transform", "statistics", "windows", "allocation")
OPTIONAL_CELL_INPUTS = CELL_INPUTS[2:]


def arguments(*names: str, optional: tuple[str, ...] = (), several: tuple[str, ...] = ()) -> argparse.Namespace:
    """Parse the command line of a job: ``--spec`` (its specification, JSON) and a path per name; an
    optional one may be empty."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--spec", required=True, type=json.loads, help="the job's specification as JSON")
    for name in names:
        parser.add_argument(
            f"--{name}",
            required=name not in optional,
            nargs="*" if name in several else "?" if name in optional else None,
        )
    return parser.parse_args()


def run(main: Callable[[], None]) -> None:
    """Run a job's ``main``; invalid input ends it with one line instead of a traceback."""
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from None


def use_threads(spec: dict[str, Any]) -> None:
    """Set the number of torch threads of the specification (results may differ in the last bit
    between thread counts)."""
    import torch

    torch.set_num_threads(spec["compute"]["threads"])


def progress(what: str) -> Callable[[Iterable], Iterable]:
    """Create a progress bar with the given title on standard error; occasional lines if that is a
    file."""
    from tqdm import tqdm

    return partial(tqdm, desc=what, mininterval=0.5 if sys.stderr.isatty() else 10.0, file=sys.stderr)


def record(spec: dict[str, Any], **inputs: str | None) -> dict[str, Any]:
    """Build the provenance of a result: axes, key, versions, seed, and the BLAKE3 digest of each
    input file."""
    about = {
        "axes": spec["axes"],
        "versions": {**spec["versions"], **versions("numpy"), "python": sys.version.split()[0]},
        "inputs": {
            name: verified.get(path) or blake3_of(path)
            for name, path in inputs.items()
            if path and os.path.isfile(path)
        },
    }
    return {
        **about,
        **({"seed": spec["seed"]} if "seed" in spec else {}),
        **({"compute": spec["compute"]} if "compute" in spec else {}),
    }
