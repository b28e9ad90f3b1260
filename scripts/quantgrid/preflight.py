"""Whether the largest jobs of a run fit where they run: predicted peak memory and disk, per rule, against what is there.

``peak_mb`` and ``disk_bytes`` of ``resources.py`` are the predictions. Standard library and psutil.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil

from . import demands, grid
from .cards import DEVICES
from .errors import ConfigError
from .pipeline import Plan
from .resources import MIB, disk_bytes, peak_mb
from .steps import COMPUTING

GB = 1e9


@dataclass(frozen=True)
class Need:
    """One job: what it does (``demands.kind``), on which model, the bytes of memory at its peak, and those that it writes."""

    job: str
    model: str
    memory: int
    disk: int

    def __str__(self) -> str:
        return f"{self.job:<20} {self.model:<24} {self.memory / GB:8.1f} GB of memory {self.disk / GB:8.1f} GB of disk"


def needs(plan: Plan, jobs: Iterable[tuple[str, Any]]) -> list[Need]:
    """The largest job of every rule among ``jobs`` (rule, wildcards), by memory; rules of the reports, whose jobs are small, are left out."""
    found: dict[str, Need] = {}
    kinds = {(rule, demands.kind(plan.config, rule, wildcards), wildcards.model) for rule, wildcards in jobs if rule in plan.steps}
    for rule, name, model in sorted(kinds):
        shape, size = grid.shape(plan.config, model), demands.size(plan.config, rule)
        need = Need(name, model, MIB * peak_mb(name, shape, **size), disk_bytes(name, shape, size["tokens"]))
        if name not in found or (need.memory, need.disk) > (found[name].memory, found[name].disk):
            found[name] = need
    return sorted(found.values(), key=lambda need: -need.memory)


def crowded(plan: Plan, rules: Iterable[str], cores: int) -> list[str]:
    """A line for each of ``rules`` whose jobs have more threads than this run has ``cores``."""
    threads = {rule: plan.threads(rule) for rule in sorted(rules) if rule in COMPUTING}
    return [f"{rule} has {count} threads on {cores} core{'s' * (cores > 1)}: slower than with as many as there are (`threads` of the config)"
            for rule, count in threads.items() if count > cores]


def made_again(jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line where outputs of ``jobs`` (name -> path or paths) are there, but not the record of their content, without which nobody believes them."""
    count = 0
    for outputs in jobs:
        paths = [path for name, found in outputs.items() if name != "digest" for path in ([found] if isinstance(found, str) else found)]
        count += "digest" in outputs and not os.path.exists(outputs["digest"]) and any(map(os.path.exists, paths))
    return [f"{count} steps left files without a record of their content (from before there were records?), so they are made again; "
            "`make verify ADOPT=1` records them as they are instead"] * bool(count)


def free_bytes(folder: str | Path) -> int:
    """Free bytes of the file system that ``folder``, which need not be there yet, would lie on."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return disk_usage(place).free


def in_memory(plan: Plan, local: bool, devices: str = DEVICES) -> bool:
    """Whether models are in the memory of this machine: jobs run on it (``local``), and not on a card of its own."""
    return local and (plan.config["compute"]["device"] == "cpu" or not glob(devices))


def require_room(found: Iterable[Need], results: str | Path, here: bool) -> None:
    """:class:`ConfigError` with the job, its model, what it needs and what there is, where one job alone cannot fit; the memory of this machine is
    asked about only where models are in it (``here``, as :func:`in_memory` says)."""
    memory, disk = psutil.virtual_memory().total, free_bytes(results)
    for need in found:
        if here and need.memory > memory:
            raise ConfigError(f"{need.job} of model '{need.model}' needs about {need.memory / GB:.1f} GB of memory at its peak, this machine has "
                              f"{memory / GB:.1f} GB: leave out the model or what asks for this job, take fewer or shorter windows, or run it where "
                              "there is more (make run PROFILE=slurm; docs/cluster.md); make run ARGS=--no-hooks asks nothing")
        if need.disk > disk:
            raise ConfigError(f"{need.job} of model '{need.model}' writes about {need.disk / GB:.1f} GB, {results} has {disk / GB:.1f} GB left: free "
                              "some (make clean-unused lists what no cell needs any more), or set results_dir to a larger disk")
