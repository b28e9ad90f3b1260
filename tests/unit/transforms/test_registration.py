"""Every module of primitives is registered with its package, so that files of transforms can be read."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from quantgrid.inference.transform import PRIMITIVES
from quantgrid.transforms import primitives


def test_the_package_imports_every_module_that_defines_a_primitive():
    folder = Path(primitives.__file__).parent
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for name in names:
        import_module(f"{primitives.__name__}.{name}")
    defining = {kind.__module__.rpartition(".")[2] for kind in PRIMITIVES.values() if kind.__module__ in modules(names)}
    assert "balanced_blocks" in defining and defining <= {*primitives.__all__}


def modules(names: list[str]) -> set[str]:
    return {f"{primitives.__name__}.{name}" for name in names}
