"""Mixture of experts of a decoder family: names of its linears, routers and shared experts. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .plans import Kept, Stored

LINEARS = ("gate", "up", "down")
_EXPERT_NAMES = {linear: f"mlp.experts.{{expert}}.{linear}_proj.weight" for linear in LINEARS}
# a shared expert behind its gate, in Qwen's mixtures
GATED_SHARED: dict[str, Any] = {
    "shared": "mlp.shared_expert",
    "shared_gate": "mlp.shared_expert_gate",
    "shared_size": "shared_expert_intermediate_size",
}


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in the place of the MLP.

    ``size`` is the key of config.json that holds the width of one expert (their number is under one of
    ``COUNT_KEYS``, or a key of the family). ``stored`` maps linears to their names in the checkpoint, with
    ``{expert}``; without it a tensor holds all experts, gate and up together row by row, ``transposed`` or
    not. ``block`` is the module of the mixture, ``router``, ``shared`` and ``shared_gate`` are modules of the
    layer; the last two are empty without a shared expert. ``shared_size`` is the key with its width, or
    ``shared_count`` that with its width in units of an expert. ``router_stored``: the router's tensor in
    the checkpoint. ``skips``: config.json names layers with an MLP instead (``mlp_only_layers``,
    ``decoder_sparse_step``); ``leading``: the key with the number of first layers with an MLP;
    ``interval``: keys of the first and last layer with experts and of the step between them; ``listed``: the key
    with ``dense`` or ``sparse`` for every layer, by default all but the first are sparse. ``biased``: linears
    and router have biases; ``clamped``: the gate has limits.
    """

    size: str
    stored: Mapping[str, str] = field(default_factory=lambda: dict(_EXPERT_NAMES))
    block: str = "mlp"
    router: str = "mlp.gate"
    router_stored: str = "mlp.gate.weight"
    shared: str = ""
    shared_gate: str = ""
    shared_size: str = ""
    shared_count: str = ""
    skips: bool = False
    leading: str = ""
    interval: tuple[str, str, str] | None = None
    listed: str = ""
    kept: tuple[Kept, ...] = ()
    transposed: bool = False
    biased: bool = False
    clamped: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether a tensor of the checkpoint holds all experts."""
        return any("{expert}" not in name for name in self.stored.values())

    @property
    def stacked(self) -> Experts:
        """The same experts in two tensors of a layer, as transformers holds them in memory."""
        names = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
        return replace(self, stored={linear: f"{self.block}.experts.{name}" for linear, name in names.items()})

    @property
    def readers(self) -> dict[str, str]:
        """Role -> module of the linears that read the input of the experts and are never rounded."""
        return {"router": self.router, **({"shared_gate": self.shared_gate} if self.shared_gate else {})}

    def linears(self, experts: int) -> dict[str, str]:
        """Role -> module of the linears of all experts, expert by expert, the shared one last."""
        names = [
            *(f"{self.block}.experts.{expert}" for expert in range(experts)),
            *([self.shared] if self.shared else []),
        ]
        roles = [*map(str, range(experts)), *(["shared"] if self.shared else [])]
        return {f"{linear}.{role}": f"{name}.{linear}_proj" for role, name in zip(roles, names) for linear in LINEARS}

    def places(self, experts: int) -> dict[str, Stored]:
        """Canonical tensor name -> its place in the checkpoint, where they differ."""
        found = {f"{self.router}.weight": Stored(self.router_stored)}
        for expert in range(experts):
            for linear, name in self.stored.items():
                module = f"{self.block}.experts.{expert}.{linear}_proj"
                if "{expert}" in name:
                    found[f"{module}.weight"] = Stored(name.format(expert=expert))
                    continue
                parts = tuple(f"{part}.{expert}" for part in LINEARS if self.stored[part] == name)
                together = parts if len(parts) > 1 else ()
                part = f"{linear}.{expert}" if together else ""
                place = Stored(f"{name}_bias", part, together, by_row=self.biased and bool(together), index=expert)
                found |= {f"{module}.bias": place} if self.biased else {}
                found[f"{module}.weight"] = Stored(
                    name, part, together, by_row=place.by_row, transposed=self.transposed, index=expert
                )
        return found
