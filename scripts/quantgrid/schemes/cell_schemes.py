"""Quantization schemes of a cell: weights, site inputs, keys and values. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..models.plans import LINEARS, kind_of, linear_key
from .quant_scheme import QuantScheme


@dataclass(frozen=True)
class KeyValueScheme:
    """Scheme of keys and values (*batch, tokens, head_dim); ``rotate_keys`` enables R3."""

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
    """Schemes of a cell; a tensor without a scheme stays in full precision.

    A ``weight`` of None stays in bfloat16, unless the cell has ``candidates``: schemes by name, of which
    an allocation gives one to every linear (``chosen``, ``0.q`` -> name; empty before the allocation).
    ``tied``: the linears that servers fuse (q, k, v; gate, up) have one scheme. A site missing in
    ``activation`` has unrounded inputs; of several candidates at a site every layer takes the best.
    ``key_value`` None leaves attention unchanged. A linear missing in ``linears`` keeps its weight and
    reads its unrounded input.
    """

    weight: QuantScheme | None = None
    activation: Mapping[str, Sequence[QuantScheme]] = field(default_factory=dict)
    key_value: KeyValueScheme | None = None
    linears: tuple[str, ...] = LINEARS
    candidates: Mapping[str, QuantScheme] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    tied: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellSchemes:
        """Parse the output of :func:`quantgrid.schemes.granularities.cell_schemes` in a job
        specification."""
        activation = {
            site: [QuantScheme.from_dict(fields) for fields in candidates]
            for site, candidates in values["activation"].items()
        }
        return cls(
            QuantScheme.from_dict(values["weight"]) if values["weight"] else None,
            activation,
            KeyValueScheme.from_dict(values["key_value"]) if values["key_value"] else None,
            tuple(values.get("linears", LINEARS)),
            {name: QuantScheme.from_dict(fields) for name, fields in values.get("candidates", {}).items()},
            tied=values.get("tied", True),
        )

    def allocated(self, chosen: Mapping[str, str]) -> CellSchemes:
        """These schemes with a candidate ``chosen`` for every linear (``0.q`` -> name)."""
        return replace(self, chosen=chosen)

    @property
    def weights(self) -> tuple[QuantScheme, ...]:
        """Distinct schemes of weights: those of an allocation, before it all of its candidates."""
        if not self.candidates:
            return (self.weight,) if self.weight else ()
        names = [name for name in self.candidates if not self.chosen or name in set(self.chosen.values())]
        return tuple(dict.fromkeys(self.candidates[name] for name in names))

    def weight_of(self, layer: int, linear: str) -> QuantScheme | None:
        """Scheme of the weight of one linear; None where it is not rounded, or not allocated yet."""
        if kind_of(linear) not in self.linears:
            return None
        if not self.candidates:
            return self.weight
        name = self.chosen.get(linear_key(layer, linear))
        return None if name is None else self.candidates[name]
