"""Records of the content of every output file, and their verification by the jobs that read it.

A job writes one record to ``digests/`` of its results folder (``steps.DIGESTS``): rule, axes, and
the BLAKE3 digest and size of each output file. The path of a file identifies the job that wrote it,
so its record is found by the path alone, and a record made for another path is not accepted. A
record contains no date and no absolute path, so it stays valid when the files move to another
folder, a cache or an object storage.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from ..ground.errors import ConfigError
from ..ground.storage import blake3_of, put_off, verified, write_json
from ..plan.steps import DIGESTS, OUTPUTS, REPORTS

NOT_OURS = {".snakemake_timestamp"}  # written by Snakemake in each output folder


class Damaged(ConfigError):
    """A file that differs from its record, or an unreadable record."""


class Unrecorded(ConfigError):
    """A file without a record of its content."""


@dataclass(frozen=True)
class Origin:
    """The job that a path belongs to: ``root`` is the results folder, ``place`` the path of one of
    its outputs below it."""

    root: str
    rule: str
    axes: tuple[tuple[str, str], ...]
    place: str

    @property
    def output(self) -> str:
        return os.path.join(self.root, self.place)

    @property
    def record(self) -> str:
        return os.path.join(self.root, DIGESTS[self.rule].format(**dict(self.axes)))


@cache
def _compiled(pattern: str) -> re.Pattern:
    parts = [
        f"(?P<{part}>{'[0-9a-f]{10}' if part == 'key' else '[^/]+'})" if number % 2 else re.escape(part)
        for number, part in enumerate(re.split(r"{(\w+)}", pattern))
    ]
    return re.compile(f"(?:(?P<root>.*)/)?(?P<place>{''.join(parts)})", re.DOTALL)


@cache
def _patterns(suffix: str) -> list[tuple[str, re.Pattern]]:
    """List (rule, pattern of one of its outputs), most folders first: a study may have the name of
    a file of the run."""
    found = [
        (rule, pattern)
        for rule, outputs in {**OUTPUTS, **REPORTS}.items()
        for pattern in outputs.values()
        if os.path.splitext(pattern)[1] == suffix
    ]
    return [(rule, _compiled(pattern)) for rule, pattern in sorted(found, key=lambda entry: -entry[1].count("/"))]


def _origins(path: str | Path) -> Iterator[Origin]:
    """List the jobs that may write to ``path``, the most specific pattern first."""
    for rule, pattern in _patterns(os.path.splitext(path)[1]):
        if match := pattern.fullmatch(str(path)):
            yield _origin(rule, match)


def _origin(rule: str, match: re.Match) -> Origin:
    found = match.groupdict()
    root, place = found.pop("root"), found.pop("place")
    found.pop("figure", None)
    return Origin(root or "", rule, tuple(found.items()), place)


def origin_of(path: str | Path) -> Origin:
    """Find the job that writes ``path``; :class:`ConfigError` if no rule does."""
    found = [*_origins(path)]
    if not found:
        raise ConfigError(f"{path}: no step of the workflow writes a file of this name, so it has no record to verify")
    return (
        found[0] if len(found) == 1 else next((origin for origin in found if os.path.isfile(origin.record)), found[0])
    )


def origin_of_record(path: str | Path, root: str | Path) -> Origin | None:
    """Find the job, without ``place``, whose record is at ``path`` below the results folder
    ``root``; None for any other file."""
    below = Path(path).relative_to(root).as_posix()
    for rule, pattern in DIGESTS.items():
        if match := _compiled(pattern).fullmatch(below):
            found = match.groupdict()
            return Origin(
                str(root),
                rule,
                tuple((name, value) for name, value in found.items() if name not in ("root", "place")),
                "",
            )
    return None


def files_of(output: str | Path) -> list[str]:
    """List a file itself, or all files below a folder, as paths, broken links included."""
    if os.path.isdir(output):
        return sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(output) for name in names if name not in NOT_OURS
        )
    return [str(output)] if os.path.lexists(output) else []


def write_record(rule: str, outputs: Iterable[str | Path], threads: int = 1) -> str:
    """Record the ``outputs`` of one job of ``rule``; returns the path of the record."""
    files: dict[str, dict[str, str | int]] = {}
    for output in map(str, outputs):
        origin = next(origin for origin in _origins(output) if origin.rule == rule)
        files |= {
            os.path.relpath(file, origin.root or "."): {
                "blake3": blake3_of(file, threads),
                "bytes": os.path.getsize(file),
            }
            for file in files_of(output)
        }
    write_json(origin.record, {"rule": rule, "axes": dict(origin.axes), "files": files})
    return origin.record


def read_record(origin: Origin) -> dict[str, dict[str, str | int]]:
    """Read a record: path below the results folder -> digest and size of each file. Raises
    :class:`Unrecorded` and :class:`Damaged`."""
    try:
        content = json.loads(Path(origin.record).read_bytes())
        owner, files = (content["rule"], content["axes"]), content["files"].items()
        recorded = {str(name): {"blake3": entry["blake3"], "bytes": entry["bytes"]} for name, entry in files}
    except FileNotFoundError:
        raise Unrecorded(
            f"{origin.output}: {origin.rule} left no record of its content ({origin.record}); delete it and run "
            "again, or, if it is as "
            "it should be, `make verify ADOPT=1`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise Damaged(f"{origin.record}: not a whole record; {_remedy(origin)}") from None
    if owner != (origin.rule, dict(origin.axes)):
        raise Damaged(f"{origin.record}: the record of another step; {_remedy(origin)}")
    return recorded


def faults(
    origin: Origin,
    recorded: Mapping[str, Mapping[str, str | int]],
    threads: int = 1,
    content: bytes | None = None,
    weights_later: bool = False,
) -> Iterator[Damaged]:
    """List faults of the output of ``origin``, whose record is ``recorded``. ``content``: that of a
    file already read.

    With ``weights_later`` the digest of a model's weights is checked on first read
    (``storage.open_tensors``): many jobs get a model and read only its tokenizer or one tensor.
    """
    held = {
        name: entry for name, entry in recorded.items() if name == origin.place or name.startswith(f"{origin.place}/")
    }
    there = {os.path.relpath(file, origin.root or ".") for file in files_of(origin.output)}
    if not held:
        yield _damaged(origin, origin.output, f"its record ({origin.record}) does not name it")
    for name in sorted({*held, *there}):
        file = os.path.join(origin.root, name)
        if name not in held:
            yield _damaged(origin, file, "was not there when this was written")
        elif not os.path.isfile(file):
            yield _damaged(origin, file, "is gone")
        elif (size := os.path.getsize(file) if content is None else len(content)) != held[name]["bytes"]:
            yield _damaged(origin, file, f"holds {size} bytes, not {held[name]['bytes']}")
        elif weights_later and origin.rule == "fetch_model" and name.endswith(".safetensors"):
            put_off[os.path.abspath(file)] = partial(_compare, origin, file, held[name]["blake3"], threads)
        elif wrong := _differs(origin, file, held[name]["blake3"], threads, content):
            yield wrong


def _differs(
    origin: Origin, file: str, expected: str | int, threads: int, content: bytes | None = None
) -> Damaged | None:
    found = blake3_of(file if content is None else content, threads)
    if found != expected:
        return _damaged(origin, file, "its content has changed")
    verified[file] = found
    return None


def _compare(origin: Origin, file: str, expected: str, threads: int) -> None:
    if wrong := _differs(origin, file, expected, threads):
        raise wrong


def verify(path: str | Path, threads: int = 1, weights_later: bool = False) -> None:
    """Raise :class:`Damaged` if a file, or a file of a folder, differs from its record,
    :class:`Unrecorded` if there is none; ``weights_later`` as in :func:`faults`."""
    origin = origin_of(path)
    for fault in faults(origin, read_record(origin), threads, weights_later=weights_later):
        raise fault


def read_verified(path: str | Path) -> bytes:
    """Read a small file once and verify it; raises the same errors as :func:`verify`."""
    origin, content = origin_of(path), Path(path).read_bytes()
    for fault in faults(origin, read_record(origin), content=content):
        raise fault
    return content


def has_record(path: str | Path) -> bool:
    """Check whether a job writes to this path and its record exists."""
    return any(os.path.isfile(origin.record) for origin in _origins(path))


def sound(path: str | Path) -> bool:
    """Check whether a file exists and matches its record."""
    try:
        verify(path)
    except ConfigError:
        return False
    return os.path.exists(path)


def cached_copies(file: str | Path) -> list[str]:
    """List the entries of the cache between workflows (``SNAKEMAKE_OUTPUT_CACHE``) of a job whose
    file is a link into it."""
    stored, entry = os.path.realpath(os.environ.get("SNAKEMAKE_OUTPUT_CACHE") or os.devnull), os.path.realpath(file)
    if not entry.startswith(stored + os.sep):
        return []
    job = re.match("[0-9a-f]*", os.path.relpath(entry, stored))[
        0
    ]  # Snakemake names entries by a digest, then by the output
    return sorted(str(path) for path in Path(stored).glob(f"{job}*"))


def _damaged(origin: Origin, file: str, reason: str) -> Damaged:
    return Damaged(f"{file}: {reason}: not what {origin.rule} wrote; {_remedy(origin, file)}")


def _remedy(origin: Origin, file: str = "") -> str:
    places = [
        place
        for place in (origin.output if origin.place else "", origin.record, *(cached_copies(file) if file else ()))
        if place
    ]
    return f"delete {' and '.join(places)} and run again (`make verify REPAIR=1` deletes them)"
