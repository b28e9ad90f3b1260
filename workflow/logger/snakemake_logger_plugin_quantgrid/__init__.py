"""Logger plugin of Snakemake: a line per finished step with the remaining time, the reason of each
failed result, and the end of the log of each failed job.

`scripts/run_workflow.py` selects it (`--logger quantgrid`) unless another `--logger` is named.
Snakemake's full output is in `.snakemake/log/` as usual.
"""

import sys
import time
from collections import deque
from logging import LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from quantgrid.jobs.progress import FAILED_RESULT, Tally, duration

SAID_OTHERWISE = (
    LogEvent.JOB_STARTED,
    LogEvent.SHELLCMD,
    LogEvent.PROGRESS,
    LogEvent.GROUP_INFO,
    LogEvent.GROUP_ERROR,
    LogEvent.RESOURCES_INFO,
    LogEvent.WORKFLOW_STARTED,
)
NOT_SAID = (
    "Select jobs to execute",
    "Execute ",
    "Removing temporary output",
    "Storing output",
    "Using shell",
    "Assuming ",
    "Building DAG",
)
BETWEEN = 60.0  # seconds between two lists of running jobs
LOG_LINES = 15  # shown of a failed job


def last_lines(path: Path, count: int) -> list[str]:
    """Read the last lines of a log; empty if it does not exist."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as log:
        return [line.rstrip("\n") for line in deque(log, count)]


class LogHandler(LogHandlerBase):
    """Print plain lines to standard error, without colours or progress bars, so that it can be
    redirected to a file."""

    writes_to_stream, writes_to_file, has_filter, has_formatter, needs_rulegraph = True, False, False, False, False

    def __post_init__(self) -> None:
        self.tally, self.listed, self.logs = Tally({}), 0.0, {}

    def emit(self, record: LogRecord) -> None:
        event, now = getattr(record, "event", None), record.created
        if event == LogEvent.RUN_INFO:
            self.tally = Tally({rule: count for rule, count in record.stats.items() if rule != "total"})
            self.say(self.format(record))
        elif event == LogEvent.JOB_INFO:
            self.tally.start(record.jobid, record.rule_name, dict(record.wildcards or {}), now)
            self.logs[record.jobid] = [*map(Path, getattr(record, "log", None) or ())]
        elif event == LogEvent.JOB_FINISHED:
            self.finished(record.job_id, now)
        elif event == LogEvent.JOB_ERROR:
            self.failed(record, now)
        elif event not in SAID_OTHERWISE and not (event is None and self.format(record).strip().startswith(NOT_SAID)):
            self.say(self.format(record))

    def finished(self, job: int, now: float) -> None:
        ended = self.tally.end(job, now)
        reasons = [
            line for path in self.logs.pop(job, ()) for line in last_lines(path, 2) if line.startswith(FAILED_RESULT)
        ]
        if reasons and ended and ended.cell:
            self.tally.broken.add(ended.cell)
        left = self.tally.seconds_left(now)
        about = f", about {duration(left)} left" if left else ""
        what = f": {ended} ({duration(now - ended.since)})" if ended else ""
        self.stamped(f"{self.tally}{about}{what}", now)
        for reason in reasons:
            self.say(f"          {reason}")
        if now - self.listed > BETWEEN and self.tally.running:
            self.listed = now
            self.say(
                "          running: "
                + ", ".join(f"{job} ({duration(now - job.since)})" for job in self.tally.running.values())
            )

    def failed(self, record: LogRecord, now: float) -> None:
        """Print rule and axes of the job and the end of its log, but not its command line, which
        holds the whole specification."""
        ended = self.tally.end(record.jobid, now, failed=True)
        self.stamped(f"FAILED {ended or record.rule_name}{f': {record.rule_msg}' if record.rule_msg else ''}", now)
        for path in map(Path, record.log or ()):
            self.say(f"          log: {path}")
            self.say("\n".join(f"          | {line}" for line in last_lines(path, LOG_LINES)))

    def stamped(self, text: str, now: float) -> None:
        self.say(f"{time.strftime('%H:%M:%S', time.localtime(now))}  {text}")

    def say(self, text: str) -> None:
        if text.strip():
            print(text, file=sys.stderr, flush=True)
