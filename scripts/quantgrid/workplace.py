"""Where a transform is learned: what it reads beside its options, and where an interrupted training is kept. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workplace:
    """``model``: a canonical folder; ``windows``: a file of token windows, None for what needs none; ``device`` as a config names it;
    ``state``: the file of an interrupted training, None to keep nothing; ``progress`` wraps the iteration over steps;
    ``save_seconds``: how often the state is written."""

    model: Path
    windows: Path | None = None
    device: str = "cpu"
    state: Path | None = None
    progress: Callable[[Iterable], Iterable] = iter
    save_seconds: float = 30.0
