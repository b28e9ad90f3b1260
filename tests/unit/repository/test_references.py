"""Files that comments, docstrings and documents name exist."""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from checkouts import ROOT

# Names such as quantizer/ranges.py, docs/reference/formats.md or workflow/rules/*.smk; no URLs and nothing in
# braces.
NAMED = re.compile(r"(?<![\w/.:<{*$-])[\w*-][\w./*-]*\.(?:py|smk)\b(?![\w*{(])|(?<![\w/.])docs/[\w./-]+\.md\b")
FOLDERS = ("scripts", "tests", "docs", "config", "workflow", "envs", ".github", ".ci")
DOCUMENTS = {".smk", ".md", ".yaml", ".yml", ".toml", ".txt"}
PLACEHOLDER = re.compile(r"(?:.*/)?[A-Z]+\.\w+")


@cache
def files() -> list[Path]:
    """Files of the repository, relative to its root."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return sorted(path.relative_to(ROOT) for path in [*found, *ROOT.iterdir()] if path.is_file())


@cache
def endings() -> set[str]:
    """Every path of the repository and every part of it that ends with the file."""
    return {"/".join(path.parts[first:]) for path in files() for first in range(len(path.parts))}


@cache
def exists(name: str) -> bool:
    """Check whether the path of a file of the repository is or ends in this name; ``*`` is any
    text."""
    return bool(fnmatch.filter(endings(), name)) if "*" in name else name in endings()


def explained(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and docstrings of Python code."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (text := ast.get_docstring(node, clean=False)):
            yield node.body[0].lineno, text


def written(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the prose of a file: comments and docstrings of code, all of others."""
    if path.suffix == ".py":
        yield from explained((ROOT / path).read_text(encoding="utf-8"))
    elif path.suffix in DOCUMENTS or path.name in ("Makefile", "Snakefile"):
        yield 1, (ROOT / path).read_text(encoding="utf-8")


def named(text: str) -> Iterator[tuple[int, str]]:
    """(lines from the first, name) of the files that a text names."""
    for match in NAMED.finditer(text):
        yield text.count("\n", 0, match.start()), match[0]


def test_named_files_exist():
    absent = [
        f"{path}:{line + after}: {name}"
        for path in files()
        for line, text in written(path)
        for after, name in named(text)
        if not exists(name) and not PLACEHOLDER.fullmatch(name)
    ]
    assert absent == []


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("see ``quantizer/ranges.py`` and `docs/reference/formats.md`", []),
        ("see ``transforms/learned_clip.py``", ["transforms/learned_clip.py"]),
        ("`tests/test_internals.py`, docs/nothing.md", ["tests/test_internals.py", "docs/nothing.md"]),
        ("rules of workflow/rules/*.smk; old/*.smk", ["old/*.smk"]),
        ("https://example.org/setup.py, <name>.py, {name}.py, $file.py", []),
    ],
)
def test_absent_files_are_found(text, absent):
    assert [name for _, name in named(text) if not exists(name)] == absent


def test_comments_and_docstrings_are_read_and_statements_are_not():
    source = '"""a.py"""\nX = "b.py"  # c.py\n\n\ndef f():\n    """d.py"""\n'
    assert sorted(explained(source)) == [(1, "a.py"), (2, "# c.py"), (6, "d.py")]
