"""Corpus of library docstrings in the pinned environment, in train, calibration and evaluation
parts.

Docstrings are read from the files of the packages, by syntax tree; nothing is imported. Calibration
and evaluation come from ``PACKAGES`` only, whose versions are pinned, so that the text is the same
on every machine. Training has all their other modules, those of ``TRAINING_PACKAGES`` and CPython's
own. The split is by module. The first copy of a repeated paragraph is kept, in the order
calibration, evaluation, training: no evaluation text is in another part.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..ground.errors import ConfigError

PARTS = ("calibration", "evaluation")
# import name -> name on PyPI
PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
}
TRAINING_PACKAGES = (
    "datasets",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "jsonschema",
    "lm_eval",
    "mpmath",
    "narwhals",
    "nltk",
    "PIL",
    "pyarrow",
    "pygments",
    "pyparsing",
    "requests",
    "safetensors",
    "snakemake",
    "sqlalchemy",
    "tokenizers",
    "tqdm",
    "transformers",
    "yaml",
)
_SHARE = 3  # percent of the modules in each held-out part
_SHORTEST = 80  # minimum characters of a docstring
_PARAGRAPH = 40  # characters; shorter paragraphs (headings) may occur in several parts
_LEFT_OUT = {
    "tests",
    "test",
    "testing",
    "conftest.py",
    "_vendor",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "pydoc_data",
}


def part_of(module: str) -> str:
    """Part of a module by the sha256 of its name: ``calibration``, ``evaluation`` or ``training``.

    The name is dotted.
    """
    drawn = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
    return PARTS[drawn // _SHARE] if drawn < _SHARE * len(PARTS) else "training"


def documents(part: str) -> list[str]:
    """Docstrings of a held-out part: one document per module with docstrings, by module name.

    Blank lines join the docstrings of a document.
    """
    seen: set[str] = set()
    held_out = {name: list(_without_repeats(_held_out(name), seen)) for name in PARTS}
    return held_out[part]


def training_documents() -> list[str]:
    """Documents of the training part. Takes minutes, because it reads thousands of files."""
    seen: set[str] = set()
    for name in PARTS:
        list(_without_repeats(_held_out(name), seen))
    return list(_without_repeats(_training_texts(), seen))


def _held_out(part: str) -> Iterator[str]:
    return (docstrings(path) for package in PACKAGES for module, path in modules(package) if part_of(module) == part)


def _training_texts() -> Iterator[str]:
    yield from (
        docstrings(path) for package in PACKAGES for module, path in modules(package) if part_of(module) == "training"
    )
    yield from (docstrings(path) for package in TRAINING_PACKAGES for _, path in modules(package))
    yield from map(docstrings, _python_files(Path(sysconfig.get_path("stdlib"))))


@cache
def modules(package: str) -> tuple[tuple[str, Path], ...]:
    """(dotted name, file) of every module of an installed package, without tests.

    Raises :class:`ConfigError` if it is not installed.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"source: library_docs needs the package '{package}', which is not installed: "
            "use the environment of `make run`"
        )
    root = Path(next(iter(found.submodule_search_locations)))
    return tuple(
        (".".join([package, *path.relative_to(root).with_suffix("").parts]), path) for path in _python_files(root)
    )


def _python_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts))


def docstrings(path: Path) -> str:
    """All docstrings of a Python file in order, separated by blank lines; empty if it cannot be
    parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other packages
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and parser tests
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted(
        (node for node in ast.walk(tree) if isinstance(node, owners)), key=lambda node: getattr(node, "lineno", 0)
    )
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text and len(text) >= _SHORTEST)


def _without_repeats(texts: Iterator[str], seen: set[str]) -> Iterator[str]:
    """Remove paragraphs in ``seen`` from the texts and add the rest to it; drop empty texts."""
    for text in texts:
        if kept := unrepeated(text, seen):
            yield kept


def unrepeated(text: str, seen: set[str]) -> str:
    """Remove paragraphs in ``seen`` from ``text`` and add the rest to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < _PARAGRAPH or key not in seen:
            kept.append(paragraph)
        seen.add(key)
    return "\n\n".join(kept).strip("\n")
