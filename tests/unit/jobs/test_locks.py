"""One run at a time in a results folder: who holds it is named, what a dead run leaves is no
obstacle, foreign machines are respected."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

import bad_inputs
import run_workflow
from checkouts import ROOT
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs import fork_server, locks
from quantgrid.jobs.drivers import DRIVER, FOLDER, HELD

HOLD = (
    "import sys; from quantgrid.jobs.locks import hold; hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def released():
    """Release in this process what a test holds."""
    yield
    for folder in list(locks._held):
        locks._let_go(folder, os.getpid())


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the folder ``results``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "results")],
        stdin=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def note(folder: Path, **changes: object) -> Path:
    """A note as a run on this machine that has ended leaves it, changed."""
    folder.mkdir(exist_ok=True)
    # a process id that Linux does not give
    content = {**locks._own(), "process": 2**22 + 1, **changes}
    (folder / locks.NOTE).write_text(json.dumps(content))
    return folder / locks.NOTE


def test_a_second_run_is_told_who_holds_the_folder(other, tmp_path):
    with pytest.raises(ConfigError) as caught:
        locks.hold(tmp_path / "results")
    message = str(caught.value)
    assert f"in use by process {other.pid} on {socket.gethostname()}" in message and "\n" not in message
    assert re.search(rf"by \w+ in {tmp_path}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", message)
    other.stdin.close()
    other.wait(20)
    assert not (tmp_path / "results" / locks.NOTE).exists()
    locks.hold(tmp_path / "results")
    locks.hold(tmp_path / "results" / ".")  # held already, by this process
    assert json.loads((tmp_path / "results" / locks.NOTE).read_text())["process"] == os.getpid()


def test_a_link_leads_to_the_same_lock(other, tmp_path):
    (tmp_path / "link").symlink_to("results")
    with pytest.raises(ConfigError, match="in use by process"):
        locks.hold(tmp_path / "link")


def test_a_killed_run_holds_nothing(other, tmp_path, capsys):
    other.kill()
    other.wait()
    assert (tmp_path / "results" / locks.NOTE).exists(), "it had no time to delete the note"
    locks.hold(tmp_path / "results")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"machine": 5}', "\0\0", '{"process": "x", "machine": "m"}'])
def test_a_garbled_note_is_replaced_with_a_word(tmp_path, content, capsys):
    (note(tmp_path)).write_text(content)
    locks.hold(tmp_path)
    assert "is corrupt and was replaced" in capsys.readouterr().err
    assert json.loads((tmp_path / locks.NOTE).read_text())["process"] == os.getpid()


def test_a_garbled_note_of_a_run_that_goes_on_protects_it_all_the_same(other, tmp_path):
    (tmp_path / "results" / locks.NOTE).write_text("{")
    with pytest.raises(ConfigError, match="a run that .* does not name"):
        locks.hold(tmp_path / "results")


def test_a_driver_that_becomes_snakemake_is_protected_by_its_note(tmp_path):
    """Between the two programs of one process nobody has the lock."""
    parent = psutil.Process(os.getppid())
    note(tmp_path, process=parent.pid, started=parent.create_time())
    with pytest.raises(ConfigError, match=f"in use by process {parent.pid}"):
        locks.hold(tmp_path)
    # another process had its number
    note(tmp_path, process=parent.pid, started=parent.create_time() - 3600)
    locks.hold(tmp_path)


def test_a_driver_waits_for_a_run_that_looks_at_its_note_and_lets_go(tmp_path, monkeypatch):
    note(tmp_path, process=os.getpid())
    looking = locks.FileLock(tmp_path / locks.LOCK, thread_local=False)
    looking.acquire()
    threading.Timer(0.2, looking.release).start()
    locks.hold(tmp_path)
    locks._let_go(tmp_path, os.getpid())
    note(tmp_path, process=os.getpid())
    looking.acquire()
    monkeypatch.setattr(locks, "PASSING", 0.1)
    # not by this process
    with pytest.raises(ConfigError, match="in use by a run that .* does not name"):
        locks.hold(tmp_path)
    looking.release()


@pytest.mark.parametrize(
    ("words", "held"),
    [
        ([], True),
        (["--touch"], True),
        (["--report-after-run"], True),
        (["--report"], False),
        (["--report=page.html"], False),
        (["--unlock"], False),
        (["--summary"], False),
        (["--lint", "json"], False),
        (["--dag=dot"], False),
        (["-n"], False),
    ],
)
def test_snakemake_is_named_the_folder_that_a_run_holds_and_other_options_hold_none(tmp_path, monkeypatch, words, held):
    config = {"results_dir": str(tmp_path / "results"), "studies": {}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_workflow, "load", lambda path: config)
    monkeypatch.setattr(run_workflow, "clear_up", lambda folder, snakemake: None)
    monkeypatch.setattr(os, "execv", lambda program, command: None)
    monkeypatch.setattr(fork_server, "start", lambda environment: None)
    monkeypatch.setattr(sys, "argv", ["run_workflow.py", "--cores", "1", *words])
    for name in (HELD, FOLDER, DRIVER, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    run_workflow.main()
    assert os.environ[HELD] == (str(tmp_path / "results") if held else "")
    assert os.environ[DRIVER] == str(os.getpid())
    assert (tmp_path / "results" / locks.NOTE).exists() == held


def test_a_note_of_another_machine_counts_on_a_file_system_that_machines_share(tmp_path, monkeypatch):
    path = note(tmp_path, machine="login2")
    monkeypatch.setattr(locks, "file_system", lambda folder: "nfs4")
    with pytest.raises(ConfigError, match=rf"on login2.*if that machine or run is gone, delete {re.escape(str(path))}"):
        locks.hold(tmp_path)
    # another container of this machine
    monkeypatch.setattr(locks, "file_system", lambda folder: "ext4")
    locks.hold(tmp_path)


def test_a_file_system_without_locks_is_said_and_the_note_counts(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    locks.hold(tmp_path)
    assert "without locks (Function not implemented)" in capsys.readouterr().err and (tmp_path / locks.NOTE).exists()
    parent = psutil.Process(os.getppid())
    note(tmp_path / "b", process=parent.pid, started=parent.create_time())
    with pytest.raises(ConfigError, match="in use by process"):
        locks.hold(tmp_path / "b")


def test_the_file_system_of_a_folder_is_known(tmp_path):
    assert locks.file_system(tmp_path) and locks.file_system(Path("/proc/self")) == "proc"


@pytest.mark.slow
def test_two_checkouts_with_one_results_folder_do_not_run_together_and_dry_runs_do(other, tmp_path):
    checkout = tmp_path / "second"
    checkout.mkdir()
    config = {**bad_inputs.valid(), "results_dir": str(tmp_path / "results")}
    (checkout / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "scripts" / "run_workflow.py"), "--configfile", "config.yaml", "--cores", "1"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(rf"quantgrid: .*in use by process {other.pid} .*\n", done.stderr)
    assert time.monotonic() - begin < 100 and not done.stdout
    done = subprocess.run([*command, "--dry-run", "--quiet"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", [False, True])
def test_plain_snakemake_and_modules_take_the_lock(other, tmp_path, module):
    checkout = tmp_path / "second"
    checkout.mkdir()
    (checkout / "config.yaml").write_text(
        yaml.safe_dump({**bad_inputs.valid(), "results_dir": str(tmp_path / "results")})
    )
    text = (
        f'module quantgrid:\n    snakefile: "{ROOT}/Snakefile"\n    config: config\n\nuse rule * from quantgrid as '
        f"q_*\n"
    )
    (checkout / "Snakefile").write_text(f'configfile: "config.yaml"\n\n{text}')
    snakefile = [] if module else ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *snakefile, "--until", f"{'q_' * module}list_steps"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1 and f"in use by process {other.pid}" in done.stderr.splitlines()[-1]
    done = subprocess.run([*command, "--dry-run", "--quiet"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    other.stdin.close()
    other.wait(20)
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "results" / "steps.csv").is_file(), done.stderr
    assert not (tmp_path / "results" / locks.NOTE).exists()
    assert not list((checkout / ".snakemake" / "locks").glob("*"))
