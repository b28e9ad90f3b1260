"""Progress of a run of the workflow: steps and cells done, jobs that compute or wait in a queue, and
the time left. Standard library only.

The time left is the predicted work of the remaining jobs, corrected by what finished jobs took, over
the number of jobs that have computed at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

CELL = ("model", "transform", "mitigation", "granularity", "format")
# prefix of the reason in the log of a job with a failure as its result
FAILED_RESULT = "the result is a failure: "
# Rules whose time depends on the method of an axis.
METHOD_OF = {
    "quantize_model": "mitigation",
    "train_mitigation": "mitigation",
    "screen_cell": "mitigation",
    "fit_transform": "transform",
}
RECENT = 20  # finished jobs whose mean seconds stand for a job that was not planned
JobKey = tuple[str, frozenset]  # rule and wildcards
Group = tuple[str, ...]  # rule, model, method: jobs whose predictions are wrong by about one factor
_PREDICTED: dict[JobKey, float] = {}


def key_of(rule: str, wildcards: Mapping[str, str]) -> JobKey:
    return rule, frozenset(wildcards.items())


def predict(jobs: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
    """Keep the predicted seconds of each job of the run (rule, wildcards, seconds) in this process."""
    _PREDICTED.clear()
    _PREDICTED.update({key_of(rule, wildcards): seconds for rule, wildcards, seconds in jobs})


def predicted() -> Mapping[JobKey, float]:
    """Return what :func:`predict` has kept; empty if the run predicts nothing (``--no-hooks``)."""
    return _PREDICTED


def group_of(rule: str, wildcards: Mapping[str, str]) -> Group:
    return rule, wildcards.get("model", ""), wildcards.get(METHOD_OF.get(rule, ""), "")


def cell_of(wildcards: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the cell of a job; None for jobs of several cells."""
    return tuple(wildcards[axis] for axis in CELL) if all(axis in wildcards for axis in CELL) else None


@dataclass
class Job:
    """One submitted job: its rule and wildcards, and the moments (seconds of any clock) at which it
    was submitted and began to compute; None while it waits in a queue. ``seconds`` is what it took,
    once it has ended."""

    rule: str
    wildcards: Mapping[str, str]
    submitted: float
    begun: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return " ".join([self.rule, *(value for name, value in self.wildcards.items() if name != "key")])

    @property
    def cell(self) -> tuple[str, ...] | None:
        return cell_of(self.wildcards)


@dataclass
class Mass:
    """Predicted and measured seconds of finished jobs."""

    predicted: float = 0.0
    measured: float = 0.0

    def factor(self, before: float, weight: float) -> float:
        """Correct the factor ``before``, which counts like ``weight`` predicted seconds."""
        return (self.measured + weight * before) / (self.predicted + weight)


@dataclass
class Tally:
    """Counts of a run. ``planned`` maps a rule to its number of jobs, ``seconds`` each job to its
    predicted seconds; without predictions all jobs count alike. ``total`` is the number of jobs known when
    the last one ended, which a race raises behind each look. ``broken`` are the cells with a failure as a result."""

    planned: Mapping[str, int]
    seconds: Mapping[JobKey, float] = field(default_factory=dict)
    active: dict[int, Job] = field(default_factory=dict)
    finished: Counter = field(default_factory=Counter)
    broken: set = field(default_factory=set)
    total: int = 0

    def __post_init__(self) -> None:
        self._left: dict[Group, Mass] = {}  # predicted seconds ahead; `measured` counts the jobs
        self._size: dict[Group, float] = {}  # mean predicted seconds of a job
        self._known: dict[tuple, Mass] = {}  # finished jobs of each prefix of a group
        self._cells = Counter(cell_of(dict(wildcards)) for _, wildcards in self.seconds)
        self._cells.pop(None, None)
        self._whole = len(self._cells)
        self._busy: list[tuple[float, float]] = []  # (moment, seconds computed by all jobs until then)
        self._computed = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds of the jobs finished last
        counted = Counter(rule for rule, _ in self.seconds)
        jobs = [(group_of(rule, dict(wildcards)), seconds) for (rule, wildcards), seconds in self.seconds.items()]
        jobs += [((rule, "", ""), 1.0) for rule, count in self.planned.items() for _ in range(count - counted[rule])]
        for group, seconds in jobs:
            left = self._left.setdefault(group, Mass())
            left.predicted, left.measured = left.predicted + seconds, left.measured + 1
        self._size = {group: left.predicted / left.measured for group, left in self._left.items()}

    def submit(self, job: int, rule: str, wildcards: Mapping[str, str], now: float) -> None:
        """Add a job that waits until :meth:`begin`."""
        self.active[job] = Job(rule, wildcards, now)

    def begin(self, job: int, now: float) -> None:
        """Note that a submitted job computes."""
        if (found := self.active.get(job)) and found.begun is None:
            found.begun = now
            self._note(now)

    def end(self, job: int, now: float, seconds: float | None = None, failed: bool = False) -> Job | None:
        """Remove ``job`` and, unless it failed, count it; None for an unknown one. ``seconds`` is
        what it computed, by default the time since :meth:`begin`, or since it was submitted."""
        ended = self.active.pop(job, None)
        if ended is None or failed:
            return ended
        begun = ended.submitted if ended.begun is None else ended.begun
        ended.seconds = now - begun if seconds is None else seconds
        self._computed += ended.seconds
        self._recent.append(ended.seconds)
        self.finished[ended.rule] += 1
        self._learn(ended)
        if ended.cell in self._cells:
            self._cells[ended.cell] -= 1
        self._note(now)
        return ended

    def _learn(self, ended: Job) -> None:
        """Move a finished job from what is ahead to what is known; one that was not planned is neither."""
        key = key_of(ended.rule, ended.wildcards)
        group = group_of(ended.rule, ended.wildcards) if key in self.seconds else (ended.rule, "", "")
        if group not in self._left:
            return
        guess, left = self.seconds.get(key, 1.0), self._left[group]
        left.predicted, left.measured = left.predicted - guess, left.measured - 1
        for length in range(len(group) + 1):
            known = self._known.setdefault(group[:length], Mass())
            known.predicted, known.measured = known.predicted + guess, known.measured + ended.seconds

    def _factor(self, group: Group) -> float:
        """Return measured over predicted seconds of a group: first that of all jobs, then of its rule,
        its model and its method. Each counts by its predicted seconds against those of one job of
        the group, so that small jobs say little about large ones."""
        factor, weight = 1.0, self._size[group]
        for length in range(len(group) + 1):
            if weight and (known := self._known.get(group[:length])):
                factor = known.factor(factor, weight)
        return factor

    def _note(self, now: float) -> None:
        now = max(now, self._busy[-1][0]) if self._busy else now
        running = sum(now - job.begun for job in self.active.values() if job.begun is not None)
        self._busy.append((now, self._computed + running))

    def width(self) -> float:
        """Return the mean number of jobs that computed at a time, in the later half of the run so
        far."""
        (first, _), (now, busy) = self._busy[0], self._busy[-1]
        place = bisect_left(self._busy, ((first + now) / 2,))
        moment, before = self._busy[min(place, len(self._busy) - 1)]
        if now > moment and busy > before:
            return (busy - before) / (now - moment)
        return busy / (now - first) if now > first else 1.0

    @property
    def steps(self) -> int:
        """Number of jobs of the run."""
        return max(self.total, sum(self.planned.values()))

    def seconds_left(self, now: float) -> float | None:
        """Estimate the time left; None before any job has finished. A job that was not planned at the start
        counts like those finished last."""
        if not self.finished:
            return None
        self._note(now)
        groups = {group: left for group, left in self._left.items() if left.measured > 0}
        work = sum(max(0.0, left.predicted) * self._factor(group) for group, left in groups.items())
        ahead = sum(left.measured for left in groups.values())
        added, usual = max(0.0, self.steps - sum(self.finished.values()) - ahead), sum(self._recent) / len(self._recent)
        work, ahead = work + added * usual, ahead + added
        for job in (job for job in self.active.values() if job.begun is not None):
            group, guess = group_of(job.rule, job.wildcards), self.seconds.get(key_of(job.rule, job.wildcards))
            if guess is not None and group in groups:
                work -= min(now - job.begun, guess * self._factor(group))
            elif added:
                work -= min(now - job.begun, usual)
        return max(0.0, work) / max(1e-9, min(self.width(), ahead)) if ahead else 0.0

    def counts(self) -> tuple[int, int]:
        """Return how many active jobs compute and how many wait."""
        computing = sum(job.begun is not None for job in self.active.values())
        return computing, len(self.active) - computing

    def __str__(self) -> str:
        """Format as ``57/349 steps, 21/158 cells (2 failed)``; cells only if predicted jobs are of
        any. A cell is done when all its jobs of this run are."""
        steps = f"{sum(self.finished.values())}/{self.steps} steps"
        done = sum(count <= 0 for count in self._cells.values())
        failed = f" ({len(self.broken)} failed)" if self.broken else ""
        return f"{steps}, {done}/{self._whole} cells{failed}" if self._whole else f"{steps}{failed}"


def duration(seconds: float) -> str:
    """Format a duration: ``12 s``, ``41 min``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
