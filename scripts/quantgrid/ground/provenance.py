"""Code and version dependencies of a result, in addition to its options. Standard library only.

The code hash of a job covers its script, the module of its method and everything these import from
quantgrid, by content (:mod:`quantgrid.ground.code_digests`): moving a comment or a module reruns
nothing, changing a formula reruns its users. The packages ``config`` and ``plan``, the presets and
every ``__init__`` are left out: their decisions reach a job through its specification. A job never
reads their tables, because an edit there would change its result and not its key
(tests/unit/plan/test_lookups.py). ``jobs.integrity`` is left out as well: it decides whether a job
computes, not its result.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .code_digests import CodeDigests
from .places import LIBRARY, SCRIPTS

_MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja"}
SOLVERS = (
    "geoopt",
    "scipy",
)  # packages used by some methods only: their versions are in the keys of those
_LEFT_OUT = {
    "config",
    "plan",
    "schemes.presets",
    "ground.provenance",
    "ground.code_digests",
    "ground.syntax_trees",
    "ground.places",
    "ground.old_names",
    "jobs.integrity",
}


def canonical(content: Any) -> str:
    """Canonical JSON: sorted keys, no spaces; equal content gives equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(content: Any, length: int = 10) -> str:
    """Short hexadecimal key of any JSON-serializable content."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:length]


@cache
def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name; ``absent`` for a missing package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "absent"
    return found


@cache
def _code() -> CodeDigests:
    return CodeDigests(SCRIPTS, LIBRARY.name, _LEFT_OUT)


@cache
def code_hash(script: str, *modules: str) -> str:
    """Content hash of a script (by rule name), of library modules and everything they import.

    Modules are dotted, relative to quantgrid.
    """
    return digest(
        [_code().digest(SCRIPTS / f"{script}.py"), *sorted(_code().digest(_code().file(module)) for module in modules)],
        16,
    )


@cache
def solvers(script: str, *modules: str) -> tuple[str, ...]:
    """Members of :data:`SOLVERS` used by a script, by library modules or by their imports."""
    used = _code().packages(SCRIPTS / f"{script}.py", *map(_code().file, modules))
    return tuple(package for package in SOLVERS if package in used)


def fingerprint(path: str | Path, whole_below: int = 64 << 20) -> dict[str, str]:
    """Identity of a file, or of the files of a model folder.

    It is the sha256 up to ``whole_below`` bytes, size and modification time beyond. In a folder
    only the files of the model count (config, weights, tokenizer), not its README.
    """
    path = Path(path).expanduser()
    files = (
        sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
        if path.is_dir()
        else [path]
    )
    return {file.name: _identity(file, file.stat().st_size, file.stat().st_mtime_ns, whole_below) for file in files}


@cache
def _identity(file: Path, size: int, changed: int, whole_below: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if size < whole_below else f"{size} bytes, changed {changed}"
