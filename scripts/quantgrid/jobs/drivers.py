"""Drivers of the workflow in a folder: active ones, and jobs left by a killed one on this machine
or in a Slurm queue.

The environment of every process started by `run_workflow.py` holds the folder, the process id of
its driver, and the results folder locked by the driver (`quantgrid.jobs.locks`; empty if none). A
file next to Snakemake's lock names the machine of the last driver: a lock of another machine is
never removed from here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ..ground.errors import ConfigError

FOLDER, DRIVER, HELD = "QUANTGRID_FOLDER", "QUANTGRID_DRIVER", "QUANTGRID_HELD"
LOCKS, STARTED, SLURM_LOGS = (
    Path(".snakemake/locks"),
    Path(".snakemake/quantgrid-driver"),
    Path(".snakemake/slurm_logs"),
)


def marked_processes(folder: str) -> list[tuple[psutil.Process, int]]:
    """Yield (process, id of its driver) for every other process started by a driver in ``folder``,
    including the driver."""
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
    """List process ids of Snakemake runs in ``folder`` started without `run_workflow.py`; they own
    their lock."""
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
    """List process ids of all runs in ``folder`` that are alive on this machine."""
    return [
        *(process.pid for process, driver in marked_processes(folder) if process.pid == driver),
        *other_drivers(folder),
    ]


def require_no_run(folder: str) -> None:
    """Raise :class:`ConfigError` if a run is active in ``folder``, or a killed one left its
    lock."""
    if drivers_of(folder) or any(Path(folder, LOCKS).glob("*")):
        raise ConfigError(
            "a run is active in this folder, or a killed run left its lock; wait for its end, or run the "
            "workflow again, then retry"
        )


def check_machine(folder: str) -> None:
    """Raise :class:`ConfigError` if another machine holds the lock in ``folder``: its processes are
    not visible here."""
    started = Path(folder, STARTED)
    if any(Path(folder, LOCKS).glob("*")) and started.is_file():
        machine, process = started.read_text().split()
        if machine != socket.gethostname():
            raise ConfigError(
                f"this folder is locked by a run on {machine} (process {process}); continue it there, or, "
                "if that machine is gone, "
                f"delete {STARTED} and run again"
            )


def note_driver(folder: str) -> None:
    """Note this process as the driver of ``folder``, for :func:`check_machine`."""
    path = Path(folder, STARTED)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{socket.gethostname()} {os.getpid()}\n")


def end_orphans(folder: str) -> bool:
    """Kill the jobs of dead drivers; True if no driver is alive. The outputs of these jobs are
    incomplete anyway."""
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
    """List ids of this user's Slurm jobs, waiting or running, submitted in ``folder``; calls squeue
    only if jobs were submitted."""
    if not Path(folder, SLURM_LOGS).is_dir():
        return []
    try:
        command = ["squeue", "--me", "--noheader", "--format", "%A|%Z"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"squeue cannot tell whether Slurm jobs of this folder still run ({error}); when none "
            f"does, delete {SLURM_LOGS}"
        ) from None
    jobs = [line.split("|", 1) for line in done.stdout.splitlines() if "|" in line]
    return [job for job, place in jobs if place == folder]


def cancel_queued(folder: str, seconds: float = 120) -> None:
    """Cancel the Slurm jobs of ``folder`` and wait for their end: a running job would write into
    the files of the next run."""
    jobs = queued(folder)
    if not jobs:
        return
    subprocess.run(["scancel", *jobs], check=True)
    end = time.monotonic() + seconds
    while set(jobs) & set(queued(folder)):
        if time.monotonic() > end:
            raise ConfigError(
                f"Slurm jobs {', '.join(jobs)} of a run that was killed do not end; look at them "
                "with squeue, then run again"
            )
        time.sleep(1)
    print(f"quantgrid: cancelled {len(jobs)} Slurm jobs of a run that was killed", file=sys.stderr)
