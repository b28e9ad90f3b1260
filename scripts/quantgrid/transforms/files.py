"""Loader of fitted transforms; registers every primitive."""

from __future__ import annotations

from pathlib import Path

from ..ground.errors import ConfigError, NumericalFailure, unknown_name
from ..ground.storage import read_metadata, read_tensors
from ..inference.transform import PRIMITIVES, Transform
from . import primitives as _registered  # noqa: F401


def load_transform(path: str | Path) -> Transform:
    """Load the transform at ``path``; raise the :class:`NumericalFailure` of a failed fit again."""
    about = read_metadata(path)
    if about.get("status") == "failed":
        raise NumericalFailure(about["reason"])
    for item in about["primitives"]:
        if item["class"] not in PRIMITIVES:
            raise ConfigError(f"{path}: {unknown_name('primitive', item['class'], PRIMITIVES)}")
    return Transform([PRIMITIVES[item["class"]](**item["options"]) for item in about["primitives"]], read_tensors(path))
