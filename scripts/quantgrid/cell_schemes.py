"""What a cell rounds: its weights, the input of every site, keys and values. Plain data; standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .architecture import LINEARS
from .schemes import QuantScheme


@dataclass(frozen=True)
class KeyValueScheme:
    """How keys and values (*batch, tokens, head_dim) are rounded; ``rotate_keys`` turns R3 on."""

    scheme: QuantScheme
    rotate_keys: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Both fields, ready for JSON."""
        return {"scheme": self.scheme.to_dict(), "rotate_keys": self.rotate_keys}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KeyValueScheme:
        return cls(QuantScheme.from_dict(values["scheme"]), values["rotate_keys"])


@dataclass(frozen=True)
class CellSchemes:
    """A ``weight`` of None stays in bfloat16, the input of a site that ``activation`` does not name in full precision; of several
    candidates at a site every layer takes the best. ``key_value`` of None: attention as it is. A linear that ``linears`` does not name keeps
    its weight and takes its input as it is before it is rounded."""

    weight: QuantScheme | None = None
    activation: Mapping[str, Sequence[QuantScheme]] = field(default_factory=dict)
    key_value: KeyValueScheme | None = None
    linears: tuple[str, ...] = LINEARS

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellSchemes:
        """From what :func:`quantgrid.granularities.cell_schemes` returns, as a job's specification holds it."""
        activation = {site: [QuantScheme.from_dict(fields) for fields in candidates] for site, candidates in values["activation"].items()}
        return cls(QuantScheme.from_dict(values["weight"]) if values["weight"] else None, activation,
                   KeyValueScheme.from_dict(values["key_value"]) if values["key_value"] else None, tuple(values.get("linears", LINEARS)))
