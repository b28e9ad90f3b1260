"""Run the workflow's scripts inside the test process: the same command line, streams and exit
status, without start-up."""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@dataclass(frozen=True)
class Done:
    """Exit status and streams of a script that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run_script(name: str, *words: object, folder: Path | str = ".") -> Done:
    """Run ``scripts/NAME.py`` with a command line, in ``folder``; an exception other than an exit
    fails the test."""
    argv, threads, status = [str(SCRIPTS / f"{name}.py"), *map(str, words)], torch.get_num_threads(), 0
    out, error = io.StringIO(), io.StringIO()
    try:
        with (
            chdir(folder),
            redirect_stdout(out),
            redirect_stderr(error),
            patch.dict(os.environ),
            patch.object(sys, "argv", argv),
        ):
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        error.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        torch.set_num_threads(threads)
    return Done(status, out.getvalue(), error.getvalue())
