"""Races: recipes compared on more and more windows, until those worse than the best have left.

At each look a candidate leaves if a one-sided t test on its differences to the leader, paired by
window, has p < alpha / (looks x candidates x (candidates - 1)). This is Bonferroni's bound over all
looks and all ordered pairs, because the leader is chosen by the same losses: with probability at
least 1 - ``alpha`` the best stays, and so does every candidate that is as good, as far as the means
of differences are normal. Pairs with the best alone would cost a third fewer windows and lose one
of 20 equal candidates in a third of the races. The looks, ``alpha`` and the number of candidates are
fixed before the race.

All functions are pure: equal losses give equal decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from scipy.special import stdtr, stdtrit

from .significance import mean_and_error, paired_difference

FLOOR = 5e-5  # nats per token: a divergence of full precision from itself in other arithmetic
FEW = 16  # windows from which on a difference may rest on one of them
SHARE = 0.5  # largest share of one window in a difference on fewer windows
ONE_LEFT, CLOSE, ALL_WINDOWS = "one candidate is left", "the others are close to the best", "all windows are used"
NONE_LEFT = "all candidates failed"


@dataclass(frozen=True)
class Conditions:
    """Conditions of a race, fixed before it.

    ``looks`` are numbers of windows, increasing; ``candidates`` is their number at the start, those
    that fail included. ``close`` is relative to the mean of the leader where ``relative``, else to perplexity:
    losses are logarithms, whose mean is no measure of damage.
    """

    looks: tuple[int, ...]
    candidates: int
    alpha: float = 0.05
    close: float = 0.05
    relative: bool = True

    def within(self, mean: float) -> float:
        """Largest difference from a leader of this mean that counts as close."""
        return self.close * mean if self.relative else math.log1p(self.close)

    @property
    def level(self) -> float:
        """Level of each test."""
        return self.alpha / (len(self.looks) * max(1, self.candidates * (self.candidates - 1)))


@dataclass(frozen=True)
class Standing:
    """A candidate at a look: mean and median of its losses (nats per token), and its mean difference
    to the leader, paired by window, with standard error and one-sided p-value; ``upper`` bounds the
    difference at the level of the race, None if nothing does."""

    mean: float
    stderr: float
    median: float
    difference: float = 0.0
    difference_stderr: float = 0.0
    p: float = 1.0
    upper: float | None = 0.0


@dataclass(frozen=True)
class Decision:
    """Result of a look: standings of all candidates in the race, best first; reasons of those that
    leave; the ``survivors``, best first; and why the race ends, empty if it goes on."""

    windows: int
    standings: Mapping[str, Standing]
    left: Mapping[str, str]
    survivors: tuple[str, ...]
    ended: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "survivors": list(self.survivors)}


@dataclass(frozen=True)
class Outcome:
    """Result of a race: the decisions in order, and the windows of each candidate when it left."""

    decisions: tuple[Decision, ...]
    windows: Mapping[str, int] = field(default_factory=dict)

    @property
    def survivors(self) -> tuple[str, ...]:
        return self.decisions[-1].survivors


def prune(predicted: Mapping[str, float], factor: float) -> dict[str, str]:
    """Find the candidates that are not raced, with the reason: those whose ``predicted`` error is
    more than ``factor`` times the smallest. Nothing guarantees that the best is not one of them."""
    least = min(predicted.values(), default=0.0)
    return {
        name: f"not raced: predicted error {error:.3g}, more than {factor:g} times the smallest, {least:.3g}"
        for name, error in predicted.items()
        if error > factor * least
    }


def decide(losses: Mapping[str, Sequence[float]], failed: Mapping[str, str], conditions: Conditions) -> Decision:
    """Decide on one look.

    ``losses`` are those of every candidate in the race on the windows up to this look, equally many
    each; ``failed`` maps the candidates whose evaluation failed to the reason.
    """
    left = dict(failed)
    if not losses:
        return Decision(0, {}, left, (), NONE_LEFT)
    count = len(next(iter(losses.values())))
    leader = min(losses, key=lambda name: (math.fsum(losses[name]), name))
    found = {name: standing(values, losses[leader], conditions.level) for name, values in losses.items()}
    order = sorted(found, key=lambda name: (found[name].mean, name))
    for name in order:
        if name != leader and found[name].p < conditions.level:
            left[name] = f"worse than {leader} on {count} windows (p = {found[name].p:.1e})"
    survivors = tuple(name for name in order if name not in left)
    standings = {name: found[name] for name in order}
    return Decision(count, standings, left, survivors, _end(survivors, standings, count, conditions))


def _end(survivors: tuple[str, ...], found: Mapping[str, Standing], count: int, conditions: Conditions) -> str:
    """Reason for which a race ends at a look of ``count`` windows; empty if it goes on."""
    if len(survivors) == 1:
        return ONE_LEFT
    within = max(conditions.within(found[survivors[0]].mean), FLOOR)
    bounds = [found[name].upper for name in survivors[1:]]
    if all(bound is not None and bound <= within for bound in bounds):
        return CLOSE
    return ALL_WINDOWS if count >= conditions.looks[-1] else ""


def standing(losses: Sequence[float], leader: Sequence[float], level: float) -> Standing:
    """Standing of a candidate by its ``losses`` and those of the ``leader`` on the same windows.

    The p-value is that of "not worse than the leader". It is 1 below two windows, and on fewer than
    ``FEW`` windows if more than ``SHARE`` of the absolute differences comes from one window.
    """
    mean, stderr = mean_and_error(losses)
    about = mean, stderr or 0.0, median(losses)
    if losses is leader:
        return Standing(*about)
    difference, error = paired_difference(losses, leader)
    if error is None:
        return Standing(*about, difference, 0.0, 1.0, None)
    if error == 0.0:
        return Standing(*about, difference, error, float(difference <= 0), difference)
    freedom = len(losses) - 1
    p = float(stdtr(freedom, -difference / error))
    parts = [abs(a - b) for a, b in zip(losses, leader)]
    if len(losses) < FEW and max(parts) > SHARE * math.fsum(parts):
        p = 1.0
    return Standing(*about, difference, error, p, difference + float(stdtrit(freedom, 1 - level)) * error)


def race(shards: Mapping[str, Sequence[Sequence[float] | str]], conditions: Conditions) -> Outcome:
    """Run a race on stored shards: candidate -> for each look the losses of its new windows, or the
    reason of a failure. Shards that no decision needs are not read."""
    decisions: list[Decision] = []
    windows = dict.fromkeys(shards, 0)
    held: dict[str, list[float]] = {name: [] for name in shards}
    for number, end in enumerate(conditions.looks):
        failed: dict[str, str] = {}
        for name in decisions[-1].survivors if decisions else shards:
            part = shards[name][number]
            if isinstance(part, str):
                failed[name] = part
                del held[name]
            else:
                held[name] += part
                windows[name] = end
        names = decisions[-1].survivors if decisions else tuple(shards)
        decisions.append(decide({name: held[name] for name in names if name not in failed}, failed, conditions))
        if decisions[-1].ended:
            break
    return Outcome(tuple(decisions), windows)


def spent(outcome: Outcome, conditions: Conditions) -> float:
    """Share of the evaluations of all candidates on all windows that a race has used."""
    return math.fsum(outcome.windows.values()) / (conditions.candidates * conditions.looks[-1])


def cut(losses: Sequence[float], looks: Sequence[int]) -> list[list[float]]:
    """Cut ``losses``, one per window, into the new windows of each look."""
    return [list(losses[start:stop]) for start, stop in zip((0, *looks), looks)]
