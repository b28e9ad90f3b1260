"""Content digests of modules for step keys: a Merkle tree over imports. Standard library only.

The digest of a module covers its syntax tree without comments and docstrings. Every name bound by
an import of the library is replaced by the digest of the defining module and the name there. Paths,
module names, aliases and the order of imports are in no digest, so moving a module or renaming a
file changes none. An edit changes the digest of the module and of everything that imports it. A
re-exported name counts where it is defined. Blocks under ``TYPE_CHECKING`` do not run and do not
count.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .syntax_trees import SCOPES, Scope, absolute_imports, running_tree, statements

_LEFT_OUT = "left out"


@dataclass(frozen=True)
class _Found:
    """A module of the library (``name`` None), or its definition of ``name``."""

    file: Path
    name: str | None = None


class _Module:
    """A file, parsed once: its tree, its import statements, and the names bound at its top with
    their counts. A digest changes the tree; the rest stays."""

    def __init__(self, file: Path):
        self.tree = running_tree(file)
        self.top = [node for node in self.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.imports = [node for node in statements(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.bindings = Counter(Scope(self.tree).bindings)


class CodeDigests:
    """Digests of the modules below ``root``, which holds the package ``package``.

    ``left_out`` names modules and packages without effect on digests. Files must not change during
    the life of the object. Import cycles raise ``ImportError``.
    """

    def __init__(self, root: Path, package: str, left_out: Iterable[str]):
        self.root, self.package = root, package
        self._left_out = tuple(self._path(f"{package}.{name}") for name in left_out)
        self._packages_left_out = tuple(path.parent for path in self._left_out if path.name == "__init__.py")
        self._modules: dict[Path, _Module] = {}
        self._files: dict[str, Path | None] = {}
        self._out: dict[Path, bool] = {}
        self._digests: dict[Path, str] = {}
        self._digesting: list[Path] = []
        self._following: list[Path] = []
        self._tables: dict[Path, dict] = {}
        self._imports: dict[Path, tuple[list[Path], set[str]]] = {}

    def digest(self, file: Path) -> str:
        """Digest of one module: 64 hexadecimal digits."""
        if file not in self._digests:
            with self._entered(file, self._digesting):
                tree = self._module(file).tree
                names = _Names(self, file, tree)
                written = ast.dump(names.visit(tree))
                read = {self.token(_Found(found.file)) for found in self._imported(file)} | names.read
                self._digests[file] = hashlib.sha256("\n".join([written, *sorted(read - {""})]).encode()).hexdigest()
        return self._digests[file]

    @contextmanager
    def _entered(self, file: Path, stack: list[Path]) -> Iterator[None]:
        """Push ``file`` on the stack of modules in progress; raise ``ImportError`` if it is already
        there."""
        if file in stack:
            circle = [*stack[stack.index(file) :], file]
            raise ImportError("import cycle: " + " -> ".join(str(path.relative_to(self.root)) for path in circle))
        stack.append(file)
        try:
            yield
        finally:
            stack.pop()

    def closure(self, *files: Path) -> set[Path]:
        """Modules and everything they import from the library, at any depth."""
        seen: set[Path] = set()
        pending = list(files)
        while pending:
            if (file := pending.pop()) not in seen:
                seen.add(file)
                pending += [found for found in self._reads(file)[0] if not self._is_left_out(found)]
        return seen

    def packages(self, *files: Path) -> set[str]:
        """Packages outside the library that the modules import, directly or indirectly."""
        return set().union(*(self._reads(file)[1] for file in self.closure(*files))) - {self.package}

    def _reads(self, file: Path) -> tuple[list[Path], set[str]]:
        """Modules of the library that a module imports, and names of all packages."""
        if file not in self._imports:
            imports = self._module(file).imports
            names = {name.partition(".")[0] for node in imports for name in absolute_imports(node)}
            self._imports[file] = ([found.file for found in self._imported(file)], names)
        return self._imports[file]

    def file(self, dotted: str) -> Path:
        """File of the module ``dotted``, relative to the package."""
        if not (path := self._path(f"{self.package}.{dotted}")).is_file():
            raise ImportError(f"quantgrid has no module '{dotted}'")
        return path

    # -- imports ------------------------------------------------------------------------------

    def bound(self, file: Path, node: ast.stmt) -> dict[str, _Found]:
        """Names bound by an import statement of ``file`` -> their definitions in the library.

        ``*`` -> the module with all its names.
        """
        if isinstance(node, ast.Import):
            return {
                alias.asname: _Found(found)
                for alias in node.names
                if alias.asname and (found := self.module(alias.name))
            }
        if not isinstance(node, ast.ImportFrom) or (source := self.module(self._dotted(file, node))) is None:
            return {}
        if source == file:  # a package that imports from its submodules
            return {
                alias.asname or alias.name: self._submodule(file, alias.name) or _Found(file, alias.name)
                for alias in node.names
            }
        return {
            alias.asname or alias.name: _Found(source) if alias.name == "*" else self.member(source, alias.name)
            for alias in node.names
        }

    def member(self, file: Path, name: str) -> _Found:
        """Definition of ``name`` of a module or package: there, in an imported module, or a
        submodule."""
        # its submodules import from it
        if file in self._following and (inside := self._submodule(file, name)):
            return inside
        if name in (table := self._members(file)):
            return table[name]
        for star in table["*"]:
            if (found := self.member(star, name)).name is None or name in self._module(found.file).bindings:
                return found
        return self._submodule(file, name) or _Found(file, name)

    def _submodule(self, file: Path, name: str) -> _Found | None:
        dotted = ".".join([*file.relative_to(self.root).parts[:-1], name])
        return _Found(module) if file.name == "__init__.py" and (module := self.module(dotted)) else None

    def _members(self, file: Path) -> dict:
        """Names that a module re-exports -> their definitions; ``*`` -> modules re-exported
        whole."""
        if file not in self._tables:
            with self._entered(file, self._following):
                bound = [item for node in self._module(file).top for item in self.bound(file, node).items()]
            times = self._module(file).bindings
            self._tables[file] = {name: found for name, found in bound if times[name] == 1 and name != "*"}
            self._tables[file]["*"] = [found.file for name, found in bound if name == "*"]
        return self._tables[file]

    def _imported(self, file: Path) -> Iterator[_Found]:
        for node in self._module(file).imports:
            yield from self.bound(file, node).values()
            if isinstance(node, ast.Import):
                yield from (
                    _Found(found) for alias in node.names if not alias.asname and (found := self.module(alias.name))
                )

    def _dotted(self, file: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        folder = file.parents[node.level - 1]
        return ".".join(
            [
                *(folder.relative_to(self.root).parts if folder.is_relative_to(self.root) else ()),
                *filter(None, [node.module]),
            ]
        )

    def module(self, dotted: str) -> Path | None:
        """File of a module or package of the library; None for anything else."""
        if dotted.partition(".")[0] != self.package:
            return None
        if dotted not in self._files:
            self._files[dotted] = file if (file := self._path(dotted)).is_file() else None
        return self._files[dotted]

    def _path(self, dotted: str) -> Path:
        path = self.root.joinpath(*dotted.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _module(self, file: Path) -> _Module:
        if file not in self._modules:
            self._modules[file] = _Module(file)
        return self._modules[file]

    def _is_left_out(self, file: Path) -> bool:
        if file not in self._out:
            self._out[file] = file in self._left_out or any(map(file.is_relative_to, self._packages_left_out))
        return self._out[file]

    def token(self, found: _Found) -> str:
        if self._is_left_out(found.file):
            code = _LEFT_OUT
        elif found.name is None and found.file.name == "__init__.py":
            code = ""  # a package alone: the names used from it count instead
        else:
            code = self.digest(found.file)
        return code if found.name is None else f"{code}.{found.name}"


class _Names(ast.NodeTransformer):
    """Replace imported names by their definitions; drop the imports."""

    def __init__(self, digests: CodeDigests, file: Path, tree: ast.Module):
        self.digests, self.file = digests, file
        self.known: dict[str, _Found] = {}
        self.read: set[str] = set()
        self._enter(tree)

    def _enter(self, scope: ast.AST) -> None:
        """Names known inside ``scope``.

        These are the names of enclosing scopes that it does not rebind, and names bound only by its
        imports.
        """
        inside = Scope(scope)
        times = Counter(inside.bindings)
        hidden = times.keys() - inside.globals
        self.known = {name: found for name, found in self.known.items() if name not in hidden}
        for node in inside.imports:
            self.known |= {
                name: found for name, found in self.digests.bound(self.file, node).items() if times[name] == 1
            }

    def _scope(self, node: ast.AST) -> ast.AST:
        kept = self.known
        self._enter(node)
        changed = self.generic_visit(node)
        self.known = kept
        return changed

    def visit(self, node: ast.AST) -> ast.AST:
        return self._scope(node) if isinstance(node, SCOPES) else super().visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        names = [alias for alias in node.names if self.digests.module(alias.name) is None]
        return ast.Import(names) if names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        bound = self.digests.bound(self.file, node)
        if not bound:
            return node
        kept = sorted(
            (name, self.digests.token(found)) for name, found in bound.items() if name != "*" and name not in self.known
        )
        return ast.Expr(ast.Constant(f"{kept}")) if kept else None

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._named(self.known[node.id]) if node.id in self.known else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        found = self._module_of(node.value)
        return self.generic_visit(node) if found is None else self._named(self.digests.member(found.file, node.attr))

    def _module_of(self, node: ast.AST) -> _Found | None:
        """Module that an expression names; None for any other expression."""
        if isinstance(node, ast.Name):
            found = self.known.get(node.id)
        elif isinstance(node, ast.Attribute) and (outer := self._module_of(node.value)):
            found = self.digests.member(outer.file, node.attr)
        else:
            found = None
        return found if found and found.name is None else None

    def _named(self, found: _Found) -> ast.Name:
        self.read.add(self.digests.token(_Found(found.file)))
        return ast.Name(id=self.digests.token(found), ctx=ast.Load())
