"""Drivers of a folder: locks of other machines are respected, queued jobs of a dead driver
cancelled, with a mock of Slurm's commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkouts import ROOT, Checkout
from in_process import run_script
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.drivers import LOCKS, SLURM_LOGS, STARTED, cancel_queued, check_machine, note_driver, queued
from quantgrid.jobs.locks import LOCK, NOTE


def locked(folder: Path, machine: str) -> str:
    (folder / LOCKS).mkdir(parents=True)
    (folder / LOCKS / "0.input.lock").touch()
    (folder / STARTED).write_text(f"{machine} 4711\n")
    return str(folder)


def test_a_lock_of_another_machine_is_not_lifted(tmp_path):
    folder = locked(tmp_path, "login2")
    with pytest.raises(ConfigError, match=r"locked by a run on login2 \(process 4711\); continue it there"):
        check_machine(folder)
    (tmp_path / LOCKS / "0.input.lock").unlink()
    check_machine(folder)


def test_a_lock_of_this_machine_and_a_folder_without_one_pass(tmp_path):
    check_machine(str(tmp_path))
    note_driver(str(tmp_path))
    assert (tmp_path / STARTED).read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    (tmp_path / LOCKS).mkdir()
    (tmp_path / LOCKS / "0.input.lock").touch()
    check_machine(str(tmp_path))


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: str) -> Path:
    """Commands squeue, which lists ``jobs``, and scancel, which empties that list and notes its
    arguments; the path of the note."""
    (folder / "bin").mkdir()
    (folder / "jobs").write_text(jobs)
    commands = {"squeue": f"cat {folder}/jobs", "scancel": f"echo $@ > {folder}/cancelled; : > {folder}/jobs"}
    for name, line in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder / "cancelled"


def test_only_jobs_of_this_folder_are_cancelled(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "quantgrid"
    (folder / SLURM_LOGS).mkdir(parents=True)
    note = stand_in(tmp_path, monkeypatch, f"11|{folder}\n12|/elsewhere\n13|{folder}\n14|{folder}-two\n")
    assert queued(str(folder)) == ["11", "13"]
    cancel_queued(str(folder))
    assert (
        note.read_text() == "11 13\n" and "cancelled 2 Slurm jobs of a run that was killed" in capsys.readouterr().err
    )
    assert queued(str(folder)) == []


def test_slurm_is_asked_only_where_jobs_have_been_and_has_to_answer(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert queued(str(tmp_path)) == []
    (tmp_path / SLURM_LOGS).mkdir(parents=True)
    with pytest.raises(ConfigError, match="squeue cannot tell"):
        queued(str(tmp_path))


def test_an_unknown_profile_is_named(tmp_path):
    done = run_script(
        "run_workflow", "--configfile", ROOT / "config" / "smoke.yaml", "--profile", "slrum", "-n", folder=tmp_path
    )
    assert done.returncode != 0 and "'slrum'" in done.stderr and "slurm" in done.stderr


@pytest.mark.slow
@pytest.mark.workflow
def test_a_target_is_one_whatever_is_said_before_it(tmp_path):
    """`make run PROFILE=gpus ARGS=...`: no option that the command adds takes the target for its
    own value."""
    checkout = Checkout.make(tmp_path / "quantgrid")
    command = [
        sys.executable,
        "scripts/run_workflow.py",
        "--configfile",
        "config/smoke.yaml",
        "--profile",
        "gpus",
        "results-smoke/steps.csv",
    ]
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in (checkout.folder / "results-smoke").iterdir() if path.is_file()} == {
        "steps.csv",
        LOCK,
    }, "the note is gone"
    for target, said in (
        ("results-smoke/steps.csv", "Nothing to be done"),
        ("no-such-target", "MissingRuleException"),
        ("results-smoke/comparisons/methods.csv", "MissingRuleException"),  # its study compares nothing
    ):  # no onstart
        done = subprocess.run([*command[:-1], target], cwd=checkout.folder, capture_output=True, text=True, timeout=600)
        assert said in done.stdout + done.stderr
        assert not (checkout.folder / "results-smoke" / NOTE).exists()
