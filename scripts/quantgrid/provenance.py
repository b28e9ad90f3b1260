"""What a result depends on besides its options: the code that ran and the versions under it. Standard library only.

The code hash of a job is taken over the syntax trees of its script, of the module of its method and of all that these import
from quantgrid, without comments and docstrings: moving a comment reruns nothing, changing a formula reruns what uses it.
``registry``, ``methods``, ``presets``, ``grid``, ``pipeline``, ``config`` and every ``__init__`` are left out: what they decide reaches a job
through its specification. A job looks nothing up in their tables: an edit there would change its result and not its key (tests/test_lookups.py).
``integrity`` and ``steps`` are left out as well: they decide whether a job computes, and where its files lie, not what is in them.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja"}
LIBRARY = Path(__file__).resolve().parent
SCRIPTS = LIBRARY.parent
SOLVERS = ("geoopt", "scipy")  # packages that compute results in some methods alone: their versions belong in the keys of these
_LEFT_OUT = {"registry", "methods", "presets", "grid", "pipeline", "provenance", "config", "integrity", "steps"}


def canonical(content: Any) -> str:
    """Canonical JSON: sorted keys, no spaces; equal content gives equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(content: Any, length: int = 10) -> str:
    """Short hexadecimal key of any JSON-able content."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:length]


@cache
def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name; ``absent`` where a package is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _strip_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) \
                and isinstance(body[0].value.value, str):
            node.body = body[1:]
    return tree


@cache
def _parsed(path: Path) -> tuple[str, frozenset[Path], frozenset[str]]:
    """(hash of the syntax tree, quantgrid modules and other packages imported anywhere in it) of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: set[Path] = set()
    packages: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= _targets(path, node)
            packages |= {node.module.partition(".")[0]} if node.module and not node.level else set()
        elif isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
            imported |= {file for alias in node.names if (file := _module_file(alias.name))}
    return hashlib.sha256(ast.dump(_strip_docstrings(tree)).encode()).hexdigest(), frozenset(imported), frozenset(packages)


def _targets(path: Path, node: ast.ImportFrom) -> set[Path]:
    """Files that one ``from ... import ...`` reads, relative or absolute; a name may be a submodule."""
    if node.level:
        folder = path.parents[node.level - 1]
        base = [*folder.relative_to(SCRIPTS).parts, *(node.module or "").split(".")] if folder.is_relative_to(SCRIPTS) else []
    else:
        base = (node.module or "").split(".")
    dotted = ".".join(part for part in base if part)
    candidates = [dotted, *(f"{dotted}.{alias.name}" for alias in node.names)]
    return {file for name in candidates if (file := _module_file(name))}


def _module_file(dotted: str) -> Path | None:
    """File of a module of the library, None for anything else and for what :data:`_LEFT_OUT` names."""
    parts = dotted.split(".")
    if parts[0] != "quantgrid" or (len(parts) == 2 and parts[1] in _LEFT_OUT):
        return None
    file = SCRIPTS.joinpath(*parts).with_suffix(".py")
    return file if file.is_file() else None


def _closure(script: str, *modules: str) -> tuple[dict[str, str], frozenset[str]]:
    """(path -> hash, other packages) of a script, of further library modules and of everything they import."""
    pending = [SCRIPTS / f"{script}.py", *(LIBRARY.joinpath(*module.split(".")).with_suffix(".py") for module in modules)]
    hashes: dict[str, str] = {}
    packages: set[str] = set()
    while pending:
        path = pending.pop()
        name = str(path.relative_to(SCRIPTS))
        if name not in hashes:
            hashes[name], imported, others = _parsed(path)
            pending.extend(imported)
            packages |= others
    return hashes, frozenset(packages)


@cache
def code_hash(script: str, *modules: str) -> str:
    """Hash of a script (by rule name), of further library modules (dotted below quantgrid) and of everything they import."""
    return digest(_closure(script, *modules)[0], 16)


@cache
def solvers(script: str, *modules: str) -> tuple[str, ...]:
    """Those of :data:`SOLVERS` that a script, further library modules or anything they import uses."""
    return tuple(package for package in SOLVERS if package in _closure(script, *modules)[1])


def fingerprint(path: str | Path, whole_below: int = 64 << 20) -> dict[str, str]:
    """Identity of a file, or of a model folder's files: sha256 up to ``whole_below`` bytes, size and time of change beyond.

    Of a folder what a model is made of counts (config, weights, tokenizer), not its README.
    """
    path = Path(path).expanduser()
    files = sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file()) if path.is_dir() else [path]
    return {file.name: _identity(file, file.stat().st_size, file.stat().st_mtime_ns, whole_below) for file in files}



@cache
def _identity(file: Path, size: int, changed: int, whole_below: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if size < whole_below else f"{size} bytes, changed {changed}"
