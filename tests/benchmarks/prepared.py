"""Preparation of benchmarks: outputs of the workflow made before the clock starts, and job commands
as in its rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from quantgrid.ground.provenance import canonical
from quantgrid.plan.steps import Step

ROOT = Path(__file__).parents[2]
_SERVED = """
import json, os, sys
from quantgrid.jobs import fork_client, fork_server
from quantgrid.machine.malloc import KEEP_FREED
fork_server.start(KEEP_FREED)
print(json.dumps({name: os.environ[name] for name in (fork_client.SOCKET, fork_client.SERVED)}), flush=True)
sys.stdin.read()
"""


def workflow(content: Mapping[str, Any], folder: Path, cores: int, *targets: str) -> list[str]:
    """The command that makes ``targets`` by the workflow of the config ``content``, which is left
    in ``folder``."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return [sys.executable, "scripts/run_workflow.py", "--configfile", str(file), "--cores", str(cores), *targets]


def make(content: Mapping[str, Any], folder: Path, paths: Iterable[str], cores: int) -> None:
    """Let the workflow make ``paths``, where they are not there yet."""
    subprocess.run(workflow(content, folder, cores, *dict.fromkeys(paths)), cwd=ROOT, check=True)


def job(step: Step, **paths: object) -> list[str]:
    """The command of a step, as its rule has it, with other ``paths`` for some inputs and for its
    outputs."""
    command = [sys.executable, "scripts/run_job.py", step.rule, "--spec", canonical(step.spec)]
    for name, path in {**step.inputs, **paths}.items():
        command += [f"--{name}", str(path)]
    return command


@contextmanager
def job_server() -> Iterator[dict[str, str]]:
    """The environment by which jobs find a process that they are forked from
    (`quantgrid.jobs.fork_server`), while it is there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as driver:
        yield json.loads(driver.stdout.readline())
        driver.stdin.close()
