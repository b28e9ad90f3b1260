"""Syntax trees of modules: the statements that run, the names bound in a scope, and imports.
Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
_BLOCKS = ("cases", "finalbody", "handlers", "orelse", "body")  # fields that hold statements


def running_tree(file: Path) -> ast.Module:
    """Syntax tree of a file without docstrings and type-checking blocks."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in statements(tree):
        body = getattr(node, "body", None)
        if body:
            node.body = [item for item in body if not _is_type_checking(item)][_is_docstring(body[0]) :]  # type: ignore[attr-defined]
    return tree


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and the statements in it at any depth, each before what it holds."""
    pending: list[ast.AST] = [tree]
    while pending:
        yield (node := pending.pop())
        for field in _BLOCKS:
            pending += getattr(node, field, ())


def absolute_imports(node: ast.AST) -> Iterator[str]:
    """Yield the modules that an import statement names absolutely; nothing for other nodes."""
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


class Scope:
    """Names bound in a scope with their counts, its global declarations and its imports.

    Nested scopes are excluded. A walrus inside a comprehension counts for the comprehension.
    """

    def __init__(self, scope: ast.AST):
        self.bindings: list[str] = []
        self.globals: set[str] = set()
        self.imports: list[ast.Import | ast.ImportFrom] = []
        pending = list(ast.iter_child_nodes(scope))
        while pending:
            node = pending.pop()
            self._count(node)
            if not isinstance(node, (ast.Name, ast.Constant, *SCOPES)):
                pending.extend(ast.iter_child_nodes(node))

    def _count(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            self.bindings += [node.id] * (not isinstance(node.ctx, ast.Load))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self.imports.append(node)
            self.bindings += [alias.asname or alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.arg):
            self.bindings.append(node.arg)
        elif isinstance(node, ast.Global):
            self.globals.update(node.names)
        elif isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
        ):
            self.bindings += [node.name] if node.name else []
        elif isinstance(node, ast.MatchMapping):
            self.bindings += [node.rest] if node.rest else []
