"""Stale files of a results folder: outputs no longer produced by any step of the config.

A place is a key with the axes before it, or a study, in a folder that steps, studies, logs or
benchmarks write to. It is unused if no planned step has that key, or its study is not in the
config. In an unused place quantgrid deletes the files named in its records, those records, logs and
benchmarks, and leftovers of Snakemake and of killed jobs; every other file is foreign and kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..ground.errors import ConfigError
from ..plan.pipeline import Plan
from ..plan.steps import OUTPUTS
from .integrity import NOT_OURS, origin_of_record, read_record

KEYED = re.compile(
    r"\.?([0-9a-f]{10})(\..*)?"
)  # a key, with a suffix, or in the temporary name of a file that a killed job was writing
STUDY_FILE = re.compile(
    r"(.+?)(?:\.items\.parquet|\.(?:csv|md|tex|png|pdf|svg|log|tsv|json))"
)  # the name of a study and its suffixes
TEMPORARY = re.compile(r"\..+\.[0-9]+\.[a-z]+")  # of `storage.replacing`, in the folder of a key
# folder of a model whose download was killed, or of a checkpoint whose first look in a race was
FETCHING = re.compile(r"\.[0-9a-f]{10}\.\w+")
# leftovers of Snakemake and of interrupted trainings and sequential quantizations
LEFT = {*NOT_OURS, "training.safetensors", "sequential.safetensors", "sequential.spool"}
LOGS = {"logs": ".log", "benchmarks": ".tsv"}
STEP_FOLDERS = sorted({pattern.split("/")[0] for outputs in OUTPUTS.values() for pattern in outputs.values()})
RECORD_FOLDERS = ("logs", "benchmarks", "digests")
STUDY_FOLDERS = ("studies", "tables", "comparisons", "figures")
STUDY_RULES = ("collect_study", "tabulate_study", "compare_study", "plot_study")


@dataclass(frozen=True)
class Unused:
    """One place below the results folder: its name up to the key or study, its files, their bytes,
    and ``foreign`` files in it."""

    place: str
    files: tuple[Path, ...]
    size: int
    foreign: tuple[Path, ...] = ()


def unused(plan: Plan) -> list[Unused]:
    """List the places of ``plan.results`` with files of steps and studies that are not in the plan,
    sorted by name."""
    results, used = Path(plan.results), used_places(plan)
    found: dict[str, list[Path]] = {}
    for file in _files(results):
        place = _place(file.relative_to(results).parts)
        if place and place not in used:
            found.setdefault(place, []).append(file)
    written = recorded(results) if found else set()
    return [
        _sorted_out(place, files, {file for file in files if _is_own(file.relative_to(results), written)})
        for place, files in sorted(found.items())
    ]


def _sorted_out(place: str, files: list[Path], own: set[Path]) -> Unused:
    """Split the files of a place into quantgrid's ``own`` and others."""
    kept = tuple(file for file in files if file in own)
    return Unused(
        place, kept, sum(file.lstat().st_size for file in kept), tuple(file for file in files if file not in own)
    )


def recorded(results: Path) -> set[str]:
    """List paths below the results folder of all files named in records, and of the records."""
    found: set[str] = set()
    for record in (results / "digests").rglob("*.json"):
        if job := origin_of_record(record, results):
            try:
                found |= {record.relative_to(results).as_posix(), *read_record(job)}
            except ConfigError:
                continue  # `make verify` reports damaged records; they list no files
    return found


def _is_own(file: Path, written: set[str]) -> bool:
    """Check whether quantgrid, or Snakemake on its behalf, wrote a file of an unused place (path
    below the results folder)."""
    folder = file.parts[0]
    if folder in LOGS:
        return file.suffix == LOGS[folder] and file.parts[1] in (*OUTPUTS, *STUDY_RULES)
    left = file.name in LEFT or TEMPORARY.fullmatch(file.name) or any(map(FETCHING.fullmatch, file.parts[:-1]))
    return file.as_posix() in written or (folder in STEP_FOLDERS and bool(left))


def used_places(plan: Plan) -> set[str]:
    """List the places of all steps and studies of a plan."""
    places: set[str] = set()
    for rule, steps in plan.all_steps().items():
        for step in steps:
            places |= {_place(Path(path).relative_to(plan.results).parts) for path in step.outputs.values()}  # type: ignore[misc]
            places |= {_record(folder, rule, [*step.wildcards.values()][:-1], step.key) for folder in RECORD_FOLDERS}
    for study in plan.studies:
        places |= {f"{folder}/{study}" for folder in STUDY_FOLDERS}
        places |= {f"{folder}/{rule}/{study}" for folder in RECORD_FOLDERS for rule in STUDY_RULES}
    return places


def delete(found: list[Unused], results: str | Path) -> None:
    """Delete the files of ``found`` and the folders below ``results`` that become empty; links are
    unlinked, not followed."""
    for file in (file for place in found for file in place.files):
        file.unlink()
        for folder in file.parents:
            if folder == Path(results) or any(folder.iterdir()):
                break
            folder.rmdir()


def _files(results: Path) -> Iterator[Path]:
    for folder in (*STEP_FOLDERS, *STUDY_FOLDERS, *RECORD_FOLDERS):
        for parent, inner, names in os.walk(results / folder):
            links = [name for name in inner if os.path.islink(os.path.join(parent, name))]
            yield from (Path(parent, name) for name in (*names, *links))


def _place(parts: tuple[str, ...]) -> str | None:
    """Return the place of a path below the results folder; None for a file that no step and no
    study writes."""
    folder = parts[0]
    if folder in STUDY_FOLDERS or (folder in RECORD_FOLDERS and parts[1] in STUDY_RULES):
        study = STUDY_FILE.fullmatch(parts[-1])
        return "/".join([*parts[:-1], study[1]]) if study else None
    if folder in RECORD_FOLDERS:
        key = KEYED.fullmatch(parts[-1])
        return _record(folder, parts[1], list(parts[2:-1]), key[1]) if key else None
    for end, part in enumerate(parts):
        if key := KEYED.fullmatch(part):
            return "/".join([*parts[:end], key[1]])
    return None


def _record(folder: str, rule: str, axes: list[str], key: str) -> str:
    """Return the place of a step's log or benchmark file. A rule may order its axes differently
    than its step, so they are sorted."""
    return "/".join([folder, rule, *sorted(axes), key])
