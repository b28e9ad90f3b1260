"""Progress of a run of the workflow: steps and cells done, running jobs, and estimated time left.
Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

CELL = ("model", "transform", "mitigation", "granularity", "format")
# prefix of the reason in the log of a job with a failure as its result
FAILED_RESULT = "the result is a failure: "
QUANTIZING = ("quantize_model", "train_mitigation", "screen_cell")
EVALUATING = ("evaluate_perplexity", "evaluate_tasks", "screen_cell")


@dataclass(frozen=True)
class Running:
    """One running job: its rule, its wildcards without the key, and its start (seconds of any
    clock)."""

    rule: str
    wildcards: Mapping[str, str]
    since: float

    def __str__(self) -> str:
        return " ".join([self.rule, *self.wildcards.values()])

    @property
    def cell(self) -> tuple[str, ...] | None:
        return tuple(self.wildcards[axis] for axis in CELL) if "format" in self.wildcards else None


@dataclass
class Tally:
    """Counts of a run. ``planned`` maps a rule to its number of jobs; ``broken`` are the cells with
    a failure as a result."""

    planned: Mapping[str, int]
    running: dict[int, Running] = field(default_factory=dict)
    finished: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    cells: set = field(default_factory=set)
    broken: set = field(default_factory=set)

    def start(self, job: int, rule: str, wildcards: Mapping[str, str], now: float) -> None:
        self.running[job] = Running(rule, {name: value for name, value in wildcards.items() if name != "key"}, now)

    def end(self, job: int, now: float, failed: bool = False) -> Running | None:
        """Remove ``job`` from the running jobs and, unless it failed, count it; None for a job
        without a recorded start."""
        ended = self.running.pop(job, None)
        if ended is not None and not failed:
            self.finished[ended.rule] += 1
            self.seconds[ended.rule] += now - ended.since
            if ended.rule in EVALUATING:
                self.cells.add(ended.cell)
        return ended

    def seconds_left(self, now: float) -> float | None:
        """Estimate the time left: mean time of each rule's finished jobs (of all jobs if it has
        none yet) times its remaining jobs, divided by the number of parallel jobs; None before any
        job has finished."""
        if not self.finished:
            return None
        overall = sum(self.seconds.values()) / sum(self.finished.values())
        mean = {
            rule: self.seconds[rule] / self.finished[rule] if self.finished[rule] else overall for rule in self.planned
        }
        spent = sum(min(now - job.since, mean.get(job.rule, 0.0)) for job in self.running.values())
        work = sum(mean[rule] * max(0, count - self.finished[rule]) for rule, count in self.planned.items())
        return max(0.0, work - spent) / max(1, len(self.running))

    def __str__(self) -> str:
        """Format as ``57/349 steps, 21/158 cells (2 failed)``; cells only if this run quantizes."""
        cells = sum(self.planned.get(rule, 0) for rule in QUANTIZING)
        steps = f"{sum(self.finished.values())}/{sum(self.planned.values())} steps"
        failed = f" ({len(self.broken)} failed)" if self.broken else ""
        return f"{steps}, {len(self.cells)}/{cells} cells{failed}" if cells else steps


def duration(seconds: float) -> str:
    """Format a duration: ``12 s``, ``41 min``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
