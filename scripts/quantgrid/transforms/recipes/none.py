"""No transform: the control of every comparison."""

from __future__ import annotations


def primitives(seed: int | None = None) -> list:
    return []
