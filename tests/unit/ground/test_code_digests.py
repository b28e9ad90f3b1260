"""Edits of code that change a hash and edits that do not, on a small library."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkouts import edit
from quantgrid.ground import provenance

FILES = {  # a library small enough that every edge of its import graph is visible
    "job.py": '''
        """The script of a rule."""
        from quantgrid import storage
        from quantgrid.config import load
        from quantgrid.numerics.solver import solve
    ''',
    "other.py": "import quantgrid.storage",
    "lazy.py": "def main():\n    from quantgrid.numerics import inner\n    import math\n    return inner, math",
    "quantgrid/__init__.py": "",
    "quantgrid/storage.py": "import json",
    "quantgrid/unused.py": "VALUE = 1",
    "quantgrid/config/__init__.py": "from .. import unused\n\n\ndef load():\n    return unused",
    "quantgrid/config/grid.py": "from .. import unused",
    "quantgrid/config/registry.py": "from .. import unused",
    "quantgrid/plan/__init__.py": "",
    "quantgrid/plan/pipeline.py": "from .. import unused",
    "quantgrid/ground/__init__.py": "",
    "quantgrid/ground/provenance.py": "from .. import unused",
    "quantgrid/numerics/__init__.py": "from ..unused import VALUE",
    "quantgrid/numerics/solver.py": '''
        """Solves."""
        from ..config.registry import nothing
        from .inner import scale


        class Solver:
            """A class."""

            def run(self, x):
                """Run."""
                # a comment
                return 2 * x


        def solve(x):
            """Solve."""
            return scale(x) + 1
    ''',
    "quantgrid/numerics/inner.py": "from __future__ import annotations\n\nfrom quantgrid.numerics import "
    "grid\n\nFACTOR = 3\n",
    # shares its name with a module that is left out, and is none
    "quantgrid/numerics/grid.py": "STEP = 1",
}


@pytest.fixture
def library(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a small library of scripts, where :mod:`quantgrid.ground.provenance` looks for
    now."""
    for name, text in FILES.items():
        path = tmp_path / "scripts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setattr(provenance, "SCRIPTS", tmp_path / "scripts")
    monkeypatch.setattr(provenance, "LIBRARY", tmp_path / "scripts" / "quantgrid")
    yield tmp_path / "scripts"
    forget()


def forget() -> None:
    """Within a process files are taken not to change."""
    provenance.code_hash.cache_clear()
    provenance._code.cache_clear()


def code(script: str = "job", *modules: str) -> str:
    """The code hash of the files as they are now."""
    forget()
    return provenance.code_hash(script, *modules)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another comment\n\n        # and one more"),
        ('"""Solves."""', '"""Solves it\n\nbetter."""'),
        ('"""Solves."""', ""),
        ('"""A class."""', '"""The class."""'),
        ('    """Solve."""\n', ""),
        ('    """Run."""\n', '    r"""Runs."""\n'),
        ("return 2 * x", "return (2\n                * x)"),
        ("\n\n\ndef solve", "\n\n\n\n\n\ndef solve"),
    ],
)
def test_comments_docstrings_and_layout_change_no_hash(library, old, new):
    before = code()
    edit(library / "quantgrid/numerics/solver.py", old, new)
    assert code() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("quantgrid/numerics/solver.py", "return 2 * x", "return 3 * x"),
        ("quantgrid/numerics/solver.py", "scale(x) + 1", "scale(x) + 1.0"),
        ("quantgrid/numerics/solver.py", "def solve(x)", "def solve(x, y=None)"),
        ("quantgrid/numerics/inner.py", "FACTOR = 3", "FACTOR = 4"),
        ("quantgrid/numerics/grid.py", "STEP = 1", "STEP = 2"),
        ("quantgrid/storage.py", "import json", "import json, os"),
    ],
)
def test_a_formula_changes_the_hash_of_all_that_use_it(library, name, old, new):
    before = code()
    edit(library / name, old, new)
    assert code() != before
    edit(library / name, new, old)
    assert code() == before  # an edit taken back costs nothing


@pytest.mark.parametrize(
    "name",
    [
        "config/__init__",
        "config/grid",
        "plan/pipeline",
        "config/registry",
        "ground/provenance",
        "unused",
        "__init__",
        "numerics/__init__",
    ],
)
def test_what_reaches_a_job_through_its_specification_is_left_out_and_so_is_what_it_alone_imports(library, name):
    before = code()
    (library / "quantgrid" / f"{name}.py").write_text("VALUE = 'another'")
    assert code() == before


def test_other_scripts_and_new_files_change_nothing(library):
    before = code()
    (library / "other.py").write_text("import quantgrid.jobs.stale")
    (library / "quantgrid/numerics/another.py").write_text("VALUE = 5")
    assert code() == before


def test_imports_inside_functions_and_plain_imports_are_followed(library):
    lazy, other = code("lazy"), code("other")
    edit(library / "quantgrid/numerics/inner.py", "FACTOR = 3", "FACTOR = 4")
    assert code("lazy") != lazy and code("other") == other
    edit(library / "quantgrid/storage.py", "import json", "import math")
    assert code("other") != other


def test_a_method_is_named_beside_the_script(library):
    before = {name: code("other", name) for name in ("unused", "numerics.solver", "numerics.inner")}
    assert len({code("other"), *before.values()}) == 4
    edit(library / "quantgrid/numerics/solver.py", "2 * x", "4 * x")
    changed = {name for name, value in before.items() if code("other", name) != value}
    assert changed == {"numerics.solver"}
    edit(library / "quantgrid/numerics/inner.py", "FACTOR = 3", "FACTOR = 9")
    assert code("other", "numerics.inner") != before["numerics.inner"]


def move(library: Path, old: str, new: str, imports: dict[str, tuple[str, str]]) -> None:
    """Move a module; ``imports``: file -> the text that names it there and its replacement."""
    (library / new).parent.mkdir(parents=True, exist_ok=True)
    (library / new).with_name("__init__.py").touch()
    (library / old).rename(library / new)
    for name, (before, after) in imports.items():
        edit(library / name, before, after)


@pytest.mark.parametrize(
    ("old", "new", "imports"),
    [
        (
            "numerics/solver.py",
            "linalg/solver.py",
            {
                "job.py": ("quantgrid.numerics.solver", "quantgrid.linalg.solver"),
                "quantgrid/linalg/solver.py": ("from .inner", "from ..numerics.inner"),
            },
        ),
        ("numerics/solver.py", "numerics/another.py", {"job.py": ("numerics.solver", "numerics.another")}),
        ("numerics/inner.py", "inner.py", {"quantgrid/numerics/solver.py": ("from .inner", "from ..inner")}),
        (
            "numerics/grid.py",
            "numerics/steps_of_a_grid.py",
            {
                "quantgrid/numerics/inner.py": (
                    "from quantgrid.numerics import grid",
                    "from quantgrid.numerics import steps_of_a_grid as grid",
                )
            },
        ),
        (
            "storage.py",
            "ground/storage.py",
            {"job.py": ("from quantgrid import storage", "from quantgrid.ground import storage")},
        ),
    ],
)
def test_moving_or_renaming_a_module_changes_no_hash(library, old, new, imports):
    before = code()
    move(library, f"quantgrid/{old}", f"quantgrid/{new}", imports)
    assert code() == before


SOURCE = "FACTOR = 3\n\n\ndef scale(x):\n    return FACTOR * x\n"
USES = [
    "from .source import scale\n\n\ndef run(x):\n    return scale(x)\n",
    "from .source import scale as stretch\n\n\ndef run(x):\n    return stretch(x)\n",
    "from . import source\n\n\ndef run(x):\n    return source.scale(x)\n",
    "from quantgrid import source as other\n\n\ndef run(x):\n    return other.scale(x)\n",
    "import quantgrid.source as other\n\n\ndef run(x):\n    return other.scale(x)\n",
    "from .handed_on import scale\n\n\ndef run(x):\n    return scale(x)\n",
    "from .rooms import scale\n\n\ndef run(x):\n    return scale(x)\n",
    "from .rooms import stretch\n\n\ndef run(x):\n    return stretch(x)\n",
    "from . import rooms\n\n\ndef run(x):\n    return rooms.stretch(x)\n",
    "from .starred import scale\n\n\ndef run(x):\n    return scale(x)\n",
]


@pytest.fixture
def used(library) -> Callable[[str], str]:
    """``used(text)``: the digest of a module with that text, in a library with a source, and with
    modules and a package that re-export it."""
    package = library / "quantgrid"
    (package / "source.py").write_text(SOURCE)
    (package / "handed_on.py").write_text("from .source import scale\n")
    (package / "starred.py").write_text("from .source import *\n")
    (package / "rooms").mkdir()
    (package / "rooms" / "__init__.py").write_text(
        "from ..source import scale\nfrom ..source import scale as stretch\nfrom . import attic\n"
    )
    (package / "rooms" / "attic.py").write_text("VALUE = 1\n")

    def digest(text: str) -> str:
        (package / "user.py").write_text(text)
        return code("other", "user")

    return digest


def test_the_same_code_by_another_import_has_the_same_hash(library, used):
    assert len({used(text) for text in USES}) == 1
    (library / "quantgrid" / "source.py").write_text(SOURCE.replace("3", "4"))
    changed = {used(text) for text in USES}
    assert len(changed) == 1 and used(USES[0]) not in {""} and code("other", "source") not in changed


@pytest.mark.parametrize("text", USES)
def test_an_edit_behind_any_kind_of_import_changes_the_hash(library, used, text):
    before = used(text)
    (library / "quantgrid" / "source.py").write_text(SOURCE.replace("FACTOR * x", "FACTOR + x"))
    assert used(text) != before


def test_star_imports_are_followed(library, used):
    text = "from .source import *\n\n\ndef run(x):\n    return scale(x)\n"
    before = used(text)
    (library / "quantgrid" / "source.py").rename(library / "quantgrid" / "spring.py")
    assert used(text.replace("source", "spring")) == before
    (library / "quantgrid" / "spring.py").write_text(SOURCE.replace("3", "4"))
    assert used(text.replace("source", "spring")) != before


def test_a_renamed_function_changes_the_hash_of_all_that_import_its_module(library, used):
    before = used(USES[0])
    (library / "quantgrid" / "source.py").write_text(SOURCE.replace("scale", "stretch"))
    assert used(USES[0].replace("import scale", "import stretch as scale")) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "from . import source\n\n\ndef run(source):\n    return source.scale(1)\n",
            "from . import source\n\n\ndef run(other):\n    return source.scale(1)\n",
        ),
        (
            "from .source import FACTOR\n\n\ndef run(x):\n    FACTOR = 1\n    return FACTOR\n",
            "from .source import FACTOR\n\n\ndef run(x):\n    return FACTOR\n",
        ),
        (
            "from .source import scale\n\nrun = [scale for scale in (1, 2)]\n",
            "from .source import scale\n\nrun = [scale for other in (1, 2)]\n",
        ),
        ("from .source import scale\n\nscale = None\n", "scale = None\n"),
        (
            "from .source import scale, FACTOR\n\n\ndef run(x):\n    return scale(x)\n",
            "from .source import scale, FACTOR\n\n\ndef run(x):\n    return FACTOR(x)\n",
        ),
        (
            "from . import source as a, storage as b\n\nrun = a.scale\n",
            "from . import source as a, storage as b\n\nrun = b.scale\n",
        ),
    ],
)
def test_different_programs_have_different_hashes(used, one, other):
    """Names that hide an import, that several statements bind, and that come from other modules."""
    assert used(one) != used(other)


def test_a_local_name_equal_to_that_of_a_module_is_not_the_module(library, used):
    text = "from . import source\n\n\ndef run(source):\n    return source.scale(1)\n"
    before = used(text)
    (library / "quantgrid" / "source.py").rename(library / "quantgrid" / "spring.py")
    assert used(text.replace("import source", "import spring")) == before


def test_what_only_type_checkers_read_changes_no_hash(used):
    text = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .source import scale\n\nVALUE = 1\n"
    assert used(text) == used(text.replace("source import scale", "storage import json"))


def test_a_circle_of_imports_is_refused_by_name(library, used):
    (library / "quantgrid" / "source.py").write_text("from .user import run\n")
    with pytest.raises(
        ImportError, match=r"import cycle: .*source.py -> quantgrid/user.py|user.py -> quantgrid/source.py"
    ):
        used(USES[0])
