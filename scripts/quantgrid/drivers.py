"""Drivers of the workflow in a folder: those that run, jobs that a killed one left behind, on this machine and in a Slurm queue.

Every process that `run_workflow.py` starts carries the folder and the process id of its driver in its environment, and
the results folder that the driver holds (`quantgrid.locks`), empty where it holds none. A file beside
Snakemake's lock says on which machine the last driver was started: a lock of another machine is never lifted from here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .errors import ConfigError

FOLDER, DRIVER, HELD = "QUANTGRID_FOLDER", "QUANTGRID_DRIVER", "QUANTGRID_HELD"
LOCKS, STARTED, SLURM_LOGS = Path(".snakemake/locks"), Path(".snakemake/quantgrid-driver"), Path(".snakemake/slurm_logs")


def marked_processes(folder: str) -> list[tuple[psutil.Process, int]]:
    """(process, id of its driver) for every other process that a driver in ``folder`` started, itself among them."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(FOLDER) == folder and process.pid != os.getpid():
                found.append((process, int(environment[DRIVER])))
        except (psutil.Error, OSError, ValueError):
            continue
    return found


def other_drivers(folder: str) -> list[int]:
    """Process ids of Snakemake runs in ``folder`` that were started without `run_workflow.py`; their lock is theirs."""
    found = []
    for process in psutil.process_iter():
        try:
            named = process.cwd() == folder and "snakemake" in [Path(part).name for part in process.cmdline()[:4]]
            if named and process.pid != os.getpid() and FOLDER not in process.environ():
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def drivers_of(folder: str) -> list[int]:
    """Process ids of all runs in ``folder`` that are alive on this machine."""
    return [*(process.pid for process, driver in marked_processes(folder) if process.pid == driver), *other_drivers(folder)]


def require_no_run(folder: str) -> None:
    """:class:`ConfigError` where a run is going on in ``folder``, or one was killed there and left its lock."""
    if drivers_of(folder) or any(Path(folder, LOCKS).glob("*")):
        raise ConfigError("a run is going on in this folder, or one was killed and left its lock; let it end or run again, then try again")


def check_machine(folder: str) -> None:
    """Refuse where the lock in ``folder`` was taken on another machine, whose processes nobody here can see."""
    started = Path(folder, STARTED)
    if any(Path(folder, LOCKS).glob("*")) and started.is_file():
        machine, process = started.read_text().split()
        if machine != socket.gethostname():
            raise ConfigError(f"this folder is locked by a run on {machine} (process {process}); continue it there, or, if that machine is gone, "
                              f"delete {STARTED} and run again")


def note_driver(folder: str) -> None:
    """Say, for :func:`check_machine`, that this process drives the workflow in ``folder``."""
    path = Path(folder, STARTED)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{socket.gethostname()} {os.getpid()}\n")


def end_orphans(folder: str) -> bool:
    """End the jobs of drivers that are gone; True where no driver is left alive. They are killed: their outputs are incomplete anyway."""
    marked = marked_processes(folder)
    alive = {process.pid for process, driver in marked if process.pid == driver}
    if not alive and not other_drivers(folder):
        cancel_queued(folder)
    orphans = [process for process, driver in marked if driver not in alive]
    for process in orphans:
        if process.is_running():
            process.kill()
    psutil.wait_procs(orphans, timeout=10)
    if orphans:
        print(f"quantgrid: ended {len(orphans)} processes of a run that was killed", file=sys.stderr)
    return not alive and not other_drivers(folder)


def queued(folder: str) -> list[str]:
    """Ids of this user's Slurm jobs, waiting or running, that were submitted in ``folder``; asked only where jobs have been."""
    if not Path(folder, SLURM_LOGS).is_dir():
        return []
    try:
        command = ["squeue", "--me", "--noheader", "--format", "%A|%Z"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"squeue cannot tell whether Slurm jobs of this folder still run ({error}); when none does, delete {SLURM_LOGS}") from None
    jobs = [line.split("|", 1) for line in done.stdout.splitlines() if "|" in line]
    return [job for job, place in jobs if place == folder]


def cancel_queued(folder: str, seconds: float = 120) -> None:
    """Cancel the Slurm jobs of ``folder`` and wait until they are gone: a job that goes on would write into the next run's files."""
    jobs = queued(folder)
    if not jobs:
        return
    subprocess.run(["scancel", *jobs], check=True)
    end = time.monotonic() + seconds
    while set(jobs) & set(queued(folder)):
        if time.monotonic() > end:
            raise ConfigError(f"Slurm jobs {', '.join(jobs)} of a run that was killed do not end; look at them with squeue, then run again")
        time.sleep(1)
    print(f"quantgrid: cancelled {len(jobs)} Slurm jobs of a run that was killed", file=sys.stderr)
