"""Logger plugin of Snakemake: a line per finished step with the remaining time, the reason of each
failed result, and the end of the log of each failed job.

`scripts/run_workflow.py` selects it (`--logger quantgrid`) unless another `--logger` is named.
Snakemake's full output is in `.snakemake/log/` as usual.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable
from logging import LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from quantgrid.jobs.progress import FAILED_RESULT, Tally, duration, predicted

SAID_OTHERWISE = (
    LogEvent.JOB_STARTED,
    LogEvent.SHELLCMD,
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
    "SLURM run ID",
    "No SLURM account given",
    "No account was given",
    "Cleaning up SLURM log files",
)
# Beginning of a message -> what is printed instead.
SAID_SHORTLY = {
    "Unable to guess SLURM account": "Slurm jobs run under your default account: the profile names none "
    "(slurm_account), and Slurm has no accounting to ask"
}
BETWEEN = 60.0  # seconds between two lists of running jobs
SKEW = 5.0  # seconds by which clocks of two machines may differ
LOG_LINES = 15  # shown of a failed job


def last_lines(path: Path, count: int) -> list[str]:
    """Read the last lines of a log; empty if it does not exist."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as log:
        return [line.rstrip("\n") for line in deque(log, count)]


def texts(logs: Iterable[Path]) -> list[Path]:
    """List the logs that hold text; a job also leaves its costs."""
    return [path for path in logs if path.suffix == ".log"]


def began(logs: Iterable[Path], submitted: float) -> float | None:
    """Return the moment at which a job wrote the first of its logs; None before it has. A log from
    before it was ``submitted`` is that of an earlier run."""
    for path in texts(logs):
        if path.is_file() and (changed := path.stat().st_mtime) > submitted - SKEW:
            return max(submitted, min(changed, time.time()))
    return None


def computed(logs: Iterable[Path]) -> float | None:
    """Read the seconds that a finished job computed, without its time in a queue and until its end was
    seen; None if it has not recorded them."""
    for path in logs:
        if path.suffix == ".tsv" and path.is_file():
            names, values = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[:2])
            return float(dict(zip(names, values))["s"])
    return None


class LogHandler(LogHandlerBase):
    """Print plain lines to standard error, without colours or progress bars, so that it can be
    redirected to a file."""

    writes_to_stream, writes_to_file, has_filter, has_formatter, needs_rulegraph = True, False, False, False, False

    def __post_init__(self) -> None:
        self.tally, self.planned, self.listed, self.logs = Tally({}), {}, 0.0, {}
        self.elsewhere: set = set()  # jobs that were submitted to a queue

    def emit(self, record: LogRecord) -> None:
        event, now = getattr(record, "event", None), record.created
        if event == LogEvent.RUN_INFO:
            self.planned = {rule: count for rule, count in record.stats.items() if rule != "total"}
            self.tally = Tally(self.planned)
            self.say(self.format(record))
        elif event == LogEvent.JOB_INFO:
            self.submitted(record, now)
        elif event == LogEvent.PROGRESS:
            self.tally.total = record.total
        elif event == LogEvent.JOB_FINISHED:
            self.finished(record.job_id, now)
        elif event == LogEvent.JOB_ERROR:
            self.failed(record, now)
        elif event not in SAID_OTHERWISE:
            self.pass_on(event, self.format(record))

    def pass_on(self, event: LogEvent | None, text: str) -> None:
        """Print a message of Snakemake or of a plugin, unless it says nothing to a reader."""
        shorter = [said for begin, said in SAID_SHORTLY.items() if text.strip().startswith(begin)]
        if event is not None or not text.strip().startswith(NOT_SAID):
            self.say(shorter[0] if shorter else text)

    def submitted(self, record: LogRecord, now: float) -> None:
        """Add a job; one of this machine computes at once, another one when its log begins."""
        if self.planned:  # the first job: by now the run has predicted its jobs
            self.tally, self.planned = Tally(self.planned, predicted()), {}
        self.tally.submit(record.jobid, record.rule_name, dict(record.wildcards or {}), now)
        self.logs[record.jobid] = [*map(Path, getattr(record, "log", None) or ())]
        if getattr(record, "local", True):
            self.tally.begin(record.jobid, now)
        else:
            self.elsewhere.add(record.jobid)

    def look_at_queue(self) -> None:
        """Find the submitted jobs that have begun."""
        for number, job in [*self.tally.active.items()]:
            if job.begun is None and (begun := began(self.logs.get(number, ()), job.submitted)):
                self.tally.begin(number, begun)

    def finished(self, job: int, now: float) -> None:
        self.look_at_queue()
        logs, elsewhere = self.logs.pop(job, ()), job in self.elsewhere
        ended = self.tally.end(job, now, computed(logs) if elsewhere else None)
        reasons = [line for path in texts(logs) for line in last_lines(path, 2) if line.startswith(FAILED_RESULT)]
        if reasons and ended and ended.cell:
            self.tally.broken.add(ended.cell)
        left = self.tally.seconds_left(now)
        about = f", about {duration(left)} left" if left else ""
        what = f": {ended} ({duration(ended.seconds)})" if ended else ""
        self.stamped(f"{self.tally}{about}{what}", now)
        for reason in reasons:
            self.say(f"          {reason}")
        if now - self.listed > BETWEEN and self.tally.active:
            self.listed = now
            self.list_active(now)

    def list_active(self, now: float) -> None:
        """Print the jobs that compute, and the number of those that wait."""
        running = [
            f"{job} ({duration(now - job.begun)})" for job in self.tally.active.values() if job.begun is not None
        ]
        queued = len(self.tally.active) - len(running)
        said = [f"running: {', '.join(running)}"] * bool(running) + [f"queued: {queued}"] * bool(queued)
        self.say(f"          {'; '.join(said)}")

    def failed(self, record: LogRecord, now: float) -> None:
        """Print rule and axes of the job and the end of its log, but not its command line, which
        holds the whole specification."""
        ended = self.tally.end(record.jobid, now, failed=True)
        self.stamped(f"FAILED {ended or record.rule_name}{f': {record.rule_msg}' if record.rule_msg else ''}", now)
        self.logs.pop(record.jobid, None)
        for path in texts(map(Path, record.log or ())):
            self.say(f"          log: {path}")
            self.say("\n".join(f"          | {line}" for line in last_lines(path, LOG_LINES)))

    def stamped(self, text: str, now: float) -> None:
        self.say(f"{time.strftime('%H:%M:%S', time.localtime(now))}  {text}")

    def say(self, text: str) -> None:
        if text.strip():
            print(text, file=sys.stderr, flush=True)
