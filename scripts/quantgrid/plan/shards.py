"""Shards: the parts of a corpus that are evaluated by one job each. Standard library only.

A shard is a range of windows, in whole batches. The first has ``first`` windows, the next as many as
all before it: 32, 32, 64, 128. Boundaries do not depend on the number of windows, so that more
windows add shards and change none; a number between two boundaries ends in a partial shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Shard:
    """Windows from ``start`` up to ``stop``, which is not included; None: up to the last one."""

    start: int
    stop: int | None

    def __str__(self) -> str:
        return f"{self.start}-{'all' if self.stop is None else self.stop}"

    @property
    def size(self) -> int | None:
        """Number of windows; None if only the corpus determines it."""
        return None if self.stop is None else self.stop - self.start


def boundaries(windows: int, first: int, batch_size: int) -> Iterator[int]:
    """Numbers of windows at which shards end: ``first`` in whole batches, then twice as many each
    time, and ``windows``."""
    end = -(-first // batch_size) * batch_size
    while end < windows:
        yield end
        end *= 2
    yield windows


def shards(windows: int | None, first: int, batch_size: int) -> list[Shard]:
    """Shards of the first ``windows`` windows of a corpus; a single one if their number is
    unknown before tokenization (None)."""
    if windows is None:
        return [Shard(0, None)]
    return [Shard(start, stop) for start, stop in pairwise((0, *boundaries(windows, first, batch_size)))]
