"""Verification of a complete results folder: every record in it, and the planned files without a
record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from ..config.shown_transforms import FIGURES
from ..ground.errors import ConfigError, shortened
from ..ground.storage import read_json, read_metadata
from ..plan.pipeline import Plan
from ..plan.steps import REPORTS
from .integrity import (
    Damaged,
    Origin,
    cached_copies,
    faults,
    files_of,
    origin_of,
    origin_of_record,
    read_record,
    write_record,
)

# rules whose checkpoints are deleted after evaluation
TEMPORARY = ("quantize_model", "train_mitigation")
REMEDY = "delete it and run again (`make verify REPAIR=1` deletes it)"
# suffixes of files that may name the axes of their step
READERS = {".json": read_json, ".safetensors": read_metadata}


@dataclass
class Audit:
    """Findings in the folder ``results``.

    ``whole`` files match their records. ``damaged`` maps an output, or an unreadable record, to the
    error. ``unrecorded`` maps a missing record to the outputs that its job left.
    """

    results: str
    whole: int = 0
    damaged: dict[str, Damaged] = field(default_factory=dict)
    unrecorded: dict[str, list[str]] = field(default_factory=dict)


def audit(plan: Plan, threads: int = 1) -> Audit:
    """Verify every file of ``plan.results`` that has a record, of this plan or another, and find
    outputs of the plan without one.

    A file without a record is damaged if it names other axes than its path, or cannot be read.
    """
    found = Audit(plan.results)
    for record in sorted(Path(plan.results, "digests").rglob("*.json")):
        if job := origin_of_record(record, plan.results):
            _verify_job(job, found, threads)
    for record, outputs in planned(plan):
        present = [path for path in outputs if os.path.lexists(path)]
        if present and not os.path.lexists(record):
            found.unrecorded[record] = outputs
            found.damaged |= {path: wrong for path in present if (wrong := _foreign(path))}
    return found


def _foreign(path: str) -> Damaged | None:
    """Return the fault of a file of another step than its path says, if it is a JSON or safetensors
    file that names its axes."""
    reader = READERS.get(os.path.splitext(path)[1])
    if reader is None or not os.path.isfile(path):
        return None
    try:
        axes = reader(path).get("axes")
    except (ConfigError, ValueError, AttributeError) as error:
        return Damaged(f"{path}: cannot be read ({shortened(str(error))}); {REMEDY}")
    if axes is None or axes == dict(origin_of(path).axes):
        return None
    return Damaged(f"{path}: the file of another step ({shortened(json.dumps(axes))}); {REMEDY}")


def _verify_job(job: Origin, found: Audit, threads: int) -> None:
    try:
        recorded = read_record(job)
        outputs = {
            (origin := origin_of(os.path.join(job.root, name))).output: origin
            for name in recorded
            if not _in_folder(job, name)
        }
        outputs |= {folder.output: folder for name in recorded if (folder := _in_folder(job, name))}
        if other := [name for name, origin in outputs.items() if origin.record != job.record]:
            raise Damaged(f"{job.record}: names {other[0]}, a file of another job; {REMEDY}")
    except ConfigError as error:
        found.damaged[job.record] = error
        return
    for output, origin in outputs.items():
        if not os.path.lexists(output) and job.rule in TEMPORARY and output.endswith(".safetensors"):
            continue
        wrong = next(faults(origin, recorded, threads), None)
        if wrong:
            found.damaged[output] = wrong
        else:
            found.whole += len(files_of(output))


def _in_folder(job: Origin, name: str) -> Origin | None:
    """Return the folder that contains a recorded file, if jobs of the rule write a folder."""
    folder = os.path.join(job.root, "/".join(name.split("/")[:3]))
    return origin_of(folder) if job.rule == "fetch_model" else None


def planned(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """List (record, outputs) of every job of a plan."""
    for steps in plan.all_steps().values():
        yield from ((step.digest, list(step.outputs.values())) for step in steps)
    values = {"study": list(plan.studies), "model": list(plan.config["models"])}
    for rule, outputs in REPORTS.items():
        axis = next((name for name in values if f"{{{name}}}" in plan.digest(rule)), None)
        for value in values[axis] if axis else [""]:
            paths = [plan.pattern(rule, output) for output in outputs]
            yield (
                plan.digest(rule).format(**{axis: value} if axis else {}),
                list(
                    dict.fromkeys(
                        path.format(**{axis: value} if axis else {}, figure=figure)
                        for path, figure in product(paths, FIGURES)
                    )
                ),
            )


def repair(found: Audit) -> list[str]:
    """Delete damaged files, their records, and their copies in a cache between workflows; returns
    the paths."""
    deleted = []
    for output in found.damaged:
        records = [] if Path(found.results, "digests") in Path(output).parents else [origin_of(output).record]
        copies = [copy for file in files_of(output) for copy in cached_copies(file)]
        for path in dict.fromkeys([*copies, output, *records]):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif os.path.lexists(path):
                os.unlink(path)
            else:
                continue
            deleted.append(path)
    return deleted


def adopt(found: Audit) -> list[str]:
    """Record files as they are if a job left all of them (its checkpoint may have been deleted) and
    none is damaged; returns the records.

    A record gets the time of its youngest file, so that files made from them are not older and are
    not recomputed.
    """
    written = []
    for record, outputs in found.unrecorded.items():
        rule = origin_of(outputs[0]).rule
        needed = [path for path in outputs if not (rule in TEMPORARY and path.endswith(".safetensors"))]
        if all(os.path.exists(path) for path in needed) and not found.damaged.keys() & set(outputs):
            write_record(rule, [path for path in outputs if os.path.exists(path)])
            age = max(_changed(path) for path in needed)
            os.utime(record, ns=(age, age))
            written.append(record)
    return written


def _changed(path: str) -> int:
    stamp = os.path.join(path, ".snakemake_timestamp")
    return os.lstat(stamp if os.path.exists(stamp) else path).st_mtime_ns
