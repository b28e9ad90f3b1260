"""A logger of Snakemake's plugin interface: a line per finished step and what is left; why a result is a failure; of a failed job the end of its log.

`scripts/run_workflow.py` asks for it (`--logger quantgrid`) unless another `--logger` is named. What Snakemake says itself is kept in
`.snakemake/log/` as ever.
"""

import sys
import time
from collections import deque
from logging import LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from quantgrid.tally import FAILED_RESULT, Tally, duration

SAID_OTHERWISE = (LogEvent.JOB_STARTED, LogEvent.SHELLCMD, LogEvent.PROGRESS, LogEvent.GROUP_INFO, LogEvent.GROUP_ERROR, LogEvent.RESOURCES_INFO,
                  LogEvent.WORKFLOW_STARTED)
NOT_SAID = ("Select jobs to execute", "Execute ", "Removing temporary output", "Storing output", "Using shell", "Assuming ", "Building DAG")
BETWEEN = 60.0  # seconds from one list of what runs to the next
LOG_LINES = 15  # of a failed job


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log, nothing where there is none."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as log:
        return [line.rstrip("\n") for line in deque(log, count)]


class LogHandler(LogHandlerBase):
    """Prints to standard error; colours and moving bars it has none, so that a file of it reads as the screen does."""

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
        reasons = [line for path in self.logs.pop(job, ()) for line in last_lines(path, 2) if line.startswith(FAILED_RESULT)]
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
            self.say("          running: " + ", ".join(f"{job} ({duration(now - job.since)})" for job in self.tally.running.values()))

    def failed(self, record: LogRecord, now: float) -> None:
        """Rule and axes of the job, its log and the end of it; the command line, which holds the whole specification, is left out."""
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
