"""Time and memory of this process, as a table of one row. Standard library only.

Snakemake's benchmark files sample the process that it starts, at first twice a second, later twice
a minute: they miss short jobs, peaks between samples, and forks of another process.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

COLUMNS = ("s", "max_rss", "cpu_time", "start")  # names of Snakemake's benchmark files, then ours
COLD, WARM = "cold", "warm"  # a fresh interpreter, or a fork of one that has the imports
_MAXRSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


@dataclass(frozen=True)
class Usage:
    """Seconds of wall time, peak resident memory in MiB, and processor seconds of a process and of
    its children that have ended; its ``start``, ``cold`` or ``warm``.

    The memory of a fork includes the imports that it shares with other forks.
    """

    seconds: float
    peak_mb: float
    cpu_seconds: float
    start: str

    def table(self) -> str:
        """Format as a TSV file of one row, with the header ``COLUMNS``."""
        row = (f"{self.seconds:.2f}", f"{self.peak_mb:.1f}", f"{self.cpu_seconds:.2f}", self.start)
        return "\n".join("\t".join(line) for line in (COLUMNS, row)) + "\n"


def begin() -> float:
    """Return the moment at which this process started, on the monotonic clock in seconds.

    Until now it has only imported, so its wall time is about its processor time.
    """
    return time.monotonic() - time.process_time()


def usage(begun: float, start: str) -> Usage:
    """Measure this process since ``begun`` (of :func:`begin`)."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return Usage(
        time.monotonic() - begun,
        max(own.ru_maxrss, children.ru_maxrss) / _MAXRSS_PER_MIB,
        own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        start,
    )
