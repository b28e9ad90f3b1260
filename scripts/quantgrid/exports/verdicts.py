"""Verdict of a target on a cell: exact, within a bound, or refused with the reason. Standard
library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

EXACT, BOUND, REFUSED = "exact", "bound", "refused"


@dataclass(frozen=True)
class Verdict:
    """Answer to whether a target holds a cell.

    ``refusals`` say what would be lost, each with the nearest recipe that can be exported; ``bounds``
    what is rounded again and by how much at most; ``losses`` what of the cell is not part of the
    export (a rounded KV cache). ``loaders`` are the programs that compute what was measured,
    ``excluded`` maps other programs to what they do instead. ``notes`` are properties of the export
    that change no result of the loaders named. ``kl`` is the largest divergence in nats per token from
    the cell that the check of the export accepts, computed in ``check_dtype``; ``served_kl`` the same of
    the loader in the dtype of the folder, where that is another one.
    """

    target: str
    refusals: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kl: float = 0.0
    check_dtype: str = "float32"
    served_kl: float = 0.0

    @property
    def kind(self) -> str:
        """``exact``, ``bound`` or ``refused``."""
        return REFUSED if self.refusals else BOUND if self.bounds else EXACT

    def text(self) -> str:
        """One line: the kind and its reasons."""
        return f"{self.kind}: {'; '.join(self.refusals or self.bounds)}" if self.refusals or self.bounds else EXACT


def refused(target: str, reasons: Iterable[str]) -> Verdict:
    """Verdict of a target that cannot hold a cell for ``reasons``."""
    return Verdict(target, refusals=tuple(reasons))
