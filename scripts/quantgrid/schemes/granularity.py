"""One granularity, parsed. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..ground.errors import ConfigError, shortened

ACCEPTED = "tensor, channel, group-N (N a number of at most nine digits, such as group-64), native"


@dataclass(frozen=True)
class Granularity:
    """``tensor``, ``channel``, or ``group`` of ``group_size`` consecutive elements.

    Its text is its name on the axis.
    """

    kind: str
    group_size: int | None = None

    @classmethod
    def parse(cls, name: object, where: str = "granularity") -> Granularity:
        """Parse ``tensor``, ``channel``, ``group-N``; errors (:class:`ConfigError`) name ``where``."""
        if name in ("tensor", "channel"):
            return cls(str(name))
        if (found := re.fullmatch(r"group-([1-9][0-9]{0,8})", str(name))) is None:
            raise ConfigError(f"{where}: unknown granularity '{shortened(str(name))}'. Accepted: {ACCEPTED}")
        return cls("group", int(found[1]))

    @classmethod
    def of_block(cls, block: int | None) -> Granularity:
        """Granularity of a format with blocks of ``block`` elements, or without blocks."""
        return cls("group", block) if block else cls("channel")

    @property
    def fields(self) -> dict[str, Any]:
        """Its fields of a quantization scheme."""
        return {"granularity": self.kind, **({"group_size": self.group_size} if self.group_size else {})}

    def __str__(self) -> str:
        return f"group-{self.group_size}" if self.group_size else self.kind
