"""Running the workflow in a copy of the repository, for the tests that need the real thing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "results*", ".snakemake", "__pycache__", ".*_cache", ".hypothesis")
# What has to be the same bytes however a run went: no times, no dates.
RESULT_FILES = (
    "evaluations/**/*.json",
    "results.csv",
    "cells.csv",
    "steps.csv",
    "studies/*.csv",
    "tables/*",
    "comparisons/*",
    "figures/*",
    "claims.csv",
    "checks/*",
    "pareto.*",
    "number-lines.*",
    "residual-error.*",
    "allocations.*",
)
LISTED = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):\n((?:    .*\n)*)", re.MULTILINE)


@dataclass
class Checkout:
    """A copy of the repository in which a config is run."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Checkout:
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT, symlinks=True)
        return cls(folder)

    def copy(self, folder: Path) -> Checkout:
        """A second checkout with the results of this one."""
        return Checkout(shutil.copytree(self.folder, folder, symlinks=True))

    def config(self, name: str = "smoke") -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config" / f"{name}.yaml").read_text())

    def write_config(self, config: dict[str, Any], name: str = "edited") -> Path:
        path = self.folder / "config" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def command(self, config: str, *options: str) -> list[str]:
        return [
            sys.executable,
            "scripts/run_workflow.py",
            "--configfile",
            f"config/{config}.yaml",
            "--cores",
            "2",
            *options,
        ]

    def start(self, config: str, *options: str) -> subprocess.Popen:
        with open(self.folder / f"{config}.log", "ab") as log:
            return subprocess.Popen(
                self.command(config, *options), cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def run(self, config: str, *options: str, ok: bool = True) -> str:
        """Output of a run (standard output and error); with ``ok``, a failure fails the test and
        shows it."""
        done = subprocess.run(
            self.command(config, *options), cwd=self.folder, capture_output=True, text=True, timeout=1500
        )
        output = done.stdout + done.stderr
        assert not ok or done.returncode == 0, output[-6000:]
        return output

    def planned(self, config: str, *options: str) -> list[tuple[str, dict[str, str]]]:
        """(rule, wildcards) of every job that a run would start."""
        output = self.run(config, "--dry-run", *options)
        jobs = []
        for rule, body in LISTED.findall(output):
            wildcards = re.search(r"^    wildcards: (.*)$", body, re.MULTILINE)
            jobs.append((rule, dict(pair.split("=", 1) for pair in wildcards[1].split(", ")) if wildcards else {}))
        return jobs

    def pretend(self, config: str) -> None:
        """Make every output of a config, empty, and let Snakemake believe that its jobs made them:
        what is planned is true, at no cost."""
        output = self.run(config, "--dry-run")
        for _, body in LISTED.findall(output):
            made = re.search(r"^    output: (.*)$", body, re.MULTILINE)
            for path in (self.folder / name for name in (made[1].split(", ") if made else ())):
                (path if path.suffix else path / "config.json").parent.mkdir(parents=True, exist_ok=True)
                (path if path.suffix else path / "config.json").touch()
        self.run(config, "--touch", "--forceall")

    def contents(self, results: str, *patterns: str) -> dict[str, bytes]:
        """Relative path -> bytes of the files of a results folder that match."""
        base = self.folder / results
        return {
            str(path.relative_to(base)): path.read_bytes()
            for pattern in patterns
            for path in sorted(base.glob(pattern))
            if path.is_file()
        }


def one_cell(checkout: Checkout) -> Checkout:
    """Its smoke config made one cell and full precision."""
    config = checkout.config()
    config["transforms"] = {"none": {"method": "none"}}
    config["studies"] = {"methods": {**config["studies"]["methods"], "mitigations": ["gptq"], "also": []}}
    config["report"] = {}
    checkout.write_config(config, "smoke")
    return checkout


def refusing_slurm(folder: Path) -> tuple[str, Path]:
    """(PATH with stand-ins for Slurm's commands first, the file that keeps the arguments of
    sbatch): sbatch refuses every job."""
    calls, programs = folder / "calls", folder / "bin"
    commands = {
        "sbatch": f'echo "$@" >> {calls}; cat > /dev/null; exit 1',
        "squeue": "exit 0",
        "sinfo": "echo PARTITION; echo 'main*'",
        **dict.fromkeys(("sacct", "sacctmgr", "sshare"), "exit 1"),
    }
    programs.mkdir()
    for name, line in commands.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return f"{programs}:{os.environ['PATH']}", calls


def running_jobs(folder: Path, rule: str = "") -> list[int]:
    """Process ids of the workflow's jobs (of one rule) in ``folder``, without the driver."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                if f"scripts/run_job.py\0{rule}".encode() in command and os.readlink(entry / "cwd") == str(folder):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def edit(path: Path, old: str, new: str) -> None:
    """Replace the text ``old``, which the file has once."""
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
