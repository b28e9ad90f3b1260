"""Check that the largest jobs of a run fit: predicted peak memory and disk per rule against free
memory and disk.

``peak_mb`` and ``disk_bytes`` of ``machine/memory.py`` are the predictions. Standard library and
psutil.
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

from ..config import entries
from ..ground.errors import ConfigError
from ..machine.gpus import DEVICES
from ..machine.memory import MIB, card_mb, disk_bytes, less_memory, peak_mb
from . import workload
from .pipeline import Plan
from .steps import COMPUTING

GB = 1e9
WIDTHS = {"float32": 4, "float64": 8}  # bytes of a weight in a forward pass on a GPU; 2 in other dtypes


@dataclass(frozen=True)
class Need:
    """Resources of one job: its kind of work (``workload.kind``), its model, its peak memory, the
    bytes it writes, and its peak memory on a GPU (0: it computes on the CPU)."""

    job: str
    model: str
    memory: int
    disk: int
    card: int = 0

    def __str__(self) -> str:
        said = f"{self.job:<20} {self.model:<24} {self.memory / GB:8.1f} GB of memory {self.disk / GB:8.1f} GB of disk"
        return f"{said} {self.card / GB:8.1f} GB of GPU memory" if self.card else said


def needs(plan: Plan, jobs: Iterable[tuple[str, Any]], card: bool = False) -> list[Need]:
    """Find the largest job of every rule among ``jobs`` (rule, wildcards), by memory; the small
    jobs of the reports are skipped. ``card``: they run on a GPU."""
    found: dict[str, Need] = {}
    kinds = {
        (rule, workload.kind(plan.config, rule, wildcards), wildcards.model)
        for rule, wildcards in jobs
        if rule in plan.steps
    }
    width = WIDTHS.get(plan.config["compute"]["dtype"], 2)
    for rule, name, model in sorted(kinds):
        shape, size = entries.shape(plan.config, model), workload.size(plan.config, rule)
        memory, disk = MIB * peak_mb(name, shape, **size), disk_bytes(name, shape, size["tokens"])
        need = Need(name, model, memory, disk, MIB * card_mb(name, shape, **size, width=width) if card else 0)
        if name not in found or (need.memory, need.disk) > (found[name].memory, found[name].disk):
            found[name] = need
    return sorted(found.values(), key=lambda need: -need.memory)


def crowded(plan: Plan, rules: Iterable[str], cores: int) -> list[str]:
    """List the ``rules`` whose jobs have more threads than this run has ``cores``, one line
    each."""
    threads = {rule: plan.threads(rule) for rule in sorted(rules) if rule in COMPUTING}
    return [
        f"{rule} has {count} threads on {cores} core{'s' * (cores > 1)}: set `threads` in the config to at "
        "most the number of cores"
        for rule, count in threads.items()
        if count > cores
    ]


def made_again(jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Report outputs of ``jobs`` (name -> path or paths) that exist without a record of their
    content; the run recomputes them."""
    count = 0
    for outputs in jobs:
        paths = [
            path
            for name, found in outputs.items()
            if name != "digest"
            for path in ([found] if isinstance(found, str) else found)
        ]
        count += "digest" in outputs and not os.path.exists(outputs["digest"]) and any(map(os.path.exists, paths))
    return [
        f"{count} steps left files without a record of their content (older than the records?), "
        "so they are recomputed; "
        "`make verify ADOPT=1` records them as they are instead"
    ] * bool(count)


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes of the file system for ``folder``, which need not exist yet."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return disk_usage(place).free


def on_card(plan: Plan, devices: str = DEVICES) -> bool:
    """Check whether jobs on this machine compute on a GPU."""
    return plan.config["compute"]["device"] != "cpu" and bool(glob(devices))


def in_memory(plan: Plan, local: bool, devices: str = DEVICES) -> bool:
    """Check whether models occupy the memory of this machine: jobs run on it (``local``), and not
    on a GPU with separate memory."""
    return local and not on_card(plan, devices)


def require_room(found: Iterable[Need], results: str | Path, here: bool, card: int | None = None) -> None:
    """Raise :class:`ConfigError` if a single job cannot fit; the message names the job, its model,
    the need and the available room. Memory is checked only if models occupy this machine's memory
    (``here``, see :func:`in_memory`), that of GPUs where it is known (``card``, bytes of one)."""
    memory, disk = psutil.virtual_memory().total, free_bytes(results)
    for need in found:
        if here and need.memory > memory:
            raise ConfigError(
                f"{need.job} of model '{need.model}' needs about {need.memory / GB:.1f} GB of memory at its "
                "peak, this machine has "
                f"{memory / GB:.1f} GB: remove the model or the cells that need this job, use fewer or shorter "
                "windows, or run it on a machine "
                "with more (make run PROFILE=slurm; docs/how-to/cluster.md); make run ARGS=--no-hooks skips this check"
            )
        if card is not None and need.card > card:
            raise ConfigError(
                f"{need.job} of model '{need.model}' needs about {need.card / GB:.1f} GB of GPU memory at its peak, "
                f"the GPU has {card / GB:.1f} GB: {less_memory(need.job)}; make run ARGS=--no-hooks skips this check"
            )
        if need.disk > disk:
            raise ConfigError(
                f"{need.job} of model '{need.model}' writes about {need.disk / GB:.1f} GB, {results} has "
                f"{disk / GB:.1f} GB left: free "
                "some (make clean-unused lists files that no cell needs), or set results_dir to a larger disk"
            )
