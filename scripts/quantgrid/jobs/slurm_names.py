"""Names of Slurm jobs after what they do. Standard library only.

The executor plugin calls all jobs of a run by one identifier, and asks Slurm for the jobs of that
name. Jobs with names of their own are found among all jobs of the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from .progress import cell_of

Query = Callable[[str], str]  # identifier of a run -> command that prints the states of its jobs
_NAMED = re.compile(r" --name \S+\Z")


def title(steps: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """Name a Slurm job of one or several steps (rule, wildcards): the rule, or ``cell`` for several
    rules, a colon, and model, transform and so on with ``/`` between; ``+2`` for two more cells."""
    found = list(steps)
    rules, places = {rule for rule, _ in found}, sorted({_place(wildcards) for _, wildcards in found})
    what = rules.pop() if len(rules) == 1 else "cell"
    return f"{what}:{places[0]}{f'+{len(places) - 1}' if len(places) > 1 else ''}"


def _place(wildcards: Mapping[str, str]) -> str:
    """Return the cell of a step, or its wildcards without the key."""
    values = cell_of(wildcards) or (value for name, value in wildcards.items() if name != "key")
    return "/".join(values) or "all"


def for_all_jobs(query: Query, option: str = "") -> Query:
    """Return ``query`` without the name of the run, with ``option`` instead. :class:`ValueError` if the
    command does not end with the name."""
    if not _NAMED.search(query("run")):
        raise ValueError(f"{query('run')!r} does not end with --name")
    return lambda run: _NAMED.sub("", query(run)) + option
