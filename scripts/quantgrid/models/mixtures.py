"""Mixture of experts of a decoder family: names of its linears, routers and shared experts. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .plans import Stored

_EXPERT_NAMES = {linear: f"mlp.experts.{{expert}}.{linear}_proj.weight" for linear in ("gate", "up", "down")}


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in the place of the MLP.

    ``size`` and ``shared_size`` are the keys of config.json that hold the widths of one expert and of the
    shared one (their number is under one of ``COUNT_KEYS``). ``stored`` maps linears to their names in the
    checkpoint, with ``{expert}``. ``router``, ``shared`` and ``shared_gate`` are modules of the layer;
    the last two are empty without a shared expert. ``router_stored``: the router's tensor in the
    checkpoint. ``skips``: config.json names layers with an MLP instead (``mlp_only_layers``,
    ``decoder_sparse_step``).
    """

    size: str
    stored: Mapping[str, str] = field(default_factory=lambda: dict(_EXPERT_NAMES))
    router: str = "mlp.gate"
    router_stored: str = "mlp.gate.weight"
    shared: str = ""
    shared_gate: str = ""
    shared_size: str = ""
    skips: bool = False

    @property
    def readers(self) -> dict[str, str]:
        """Role -> module of the linears that read the input of the experts and are never rounded."""
        return {"router": self.router, **({"shared_gate": self.shared_gate} if self.shared_gate else {})}

    def linears(self, experts: int) -> dict[str, str]:
        """Role -> module of the linears of all experts, expert by expert, the shared one last."""
        names = [*(f"mlp.experts.{expert}" for expert in range(experts)), *([self.shared] if self.shared else [])]
        roles = [*map(str, range(experts)), *(["shared"] if self.shared else [])]
        return {
            f"{linear}.{role}": f"{name}.{linear}_proj"
            for role, name in zip(roles, names)
            for linear in ("gate", "up", "down")
        }

    def places(self, experts: int) -> dict[str, Stored]:
        """Canonical tensor name -> its place in the checkpoint, where they differ."""
        found = {
            f"mlp.experts.{expert}.{linear}_proj.weight": Stored(name.format(expert=expert))
            for expert in range(experts)
            for linear, name in self.stored.items()
        }
        return {**found, f"{self.router}.weight": Stored(self.router_stored)}
