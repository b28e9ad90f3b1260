"""Contenders taken in turns, so that what else the machine does meets all of them: calls in this
process, or commands in fresh ones."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# As the workflow starts its jobs (KEEP_FREED of quantgrid.machine.malloc, which peers' environments
# cannot import): freed memory stays.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def medians(
    calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each call by ``clock`` (seconds), all of them once per repeat, after
    one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append(1e3 * (clock() - start))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def solver_options(description: str, *files: str) -> argparse.ArgumentParser:
    """Options of every contender that solves with GPTQ: its ``files``, the group size, the damping,
    the threads."""
    parser = argparse.ArgumentParser(description=description)
    for name in files:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--damping", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser


@dataclass(frozen=True)
class Process:
    """A finished command: seconds from its start to its end, seconds of processors (user and
    system, of its children too), largest resident memory, and what it printed."""

    seconds: float
    processor_seconds: float
    peak_mb: float
    output: str


def run(
    command: Sequence[str], threads: int, log: Path, environment: Mapping[str, str] = ALLOCATOR, folder: Path = ROOT
) -> Process:
    """Run ``command`` in ``folder`` with ``threads`` threads; standard error goes to ``log``, a
    failure shows its end.

    The peak is the kernel's ``ru_maxrss`` of the child. A process begins with the peak of the one
    that starts it, so whoever calls this must have stayed small: no torch.
    """
    settings = {
        **environment,
        "HF_HUB_OFFLINE": "1",
        **{name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    }
    start = time.perf_counter()
    with open(log, "ab") as errors:
        child = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    if child.returncode:
        raise SystemExit(
            f"{' '.join(command)[:300]}: ended with {child.returncode}\n{log.read_text(errors='replace')[-3000:]}"
        )
    return Process(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def peak_mb() -> float:
    """Largest resident memory of this process so far; unlike ``ru_maxrss`` without that of the
    process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
