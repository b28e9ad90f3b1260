"""Description of a decoder family, and the plan of a layer that follows from it.

A plan says which sites a layer has, where an operation can be folded, and in which tensor of the
checkpoint each role lies. Standard library only: the grid reads plans when the DAG is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .plans import SITES, LayerPlan, Site, Stored

_MODULES: dict[str, str] = {
    **{linear: f"self_attn.{linear}_proj" for linear in ("q", "k", "v", "o")},
    **{linear: f"mlp.{linear}_proj" for linear in ("gate", "up", "down")},
}

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


@dataclass(frozen=True)
class Family:
    """Differences of a decoder architecture from Llama's.

    ``biases`` maps linears to the key of config.json that gives them a bias, or to True. The norms
    before attention and MLP are None where q, k, v or gate, up read the residual stream itself; the
    two post-norms stand between o or down and the stream. ``head_norms`` maps the modules that
    normalize queries and keys to the width of their gain: ``head``, or ``q`` and ``k`` for all heads
    together. ``gain_offset``: a gain is this plus the stored value. ``joined`` maps a module to the
    linears that its weight holds one after another. ``logits`` maps ``multiply``, ``divide`` and
    ``softcap`` to the keys of config.json that hold the number. ``defaults`` are the values of keys that
    a config.json may leave out, where they differ from Llama's; ``settings`` are the keys that affect the
    function of this family only.
    """

    model_type: str
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    head_norms: Mapping[str, str] = field(default_factory=dict)
    gain_offset: float = 0.0
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    logits: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    experts: Experts | None = None

    @cached_property
    def norms(self) -> dict[str, str]:
        """Role -> module of the norms of a layer with a gain as wide as the residual stream."""
        named = {
            "attention_norm": self.attention_norm,
            "mlp_norm": self.mlp_norm,
            "post_attention_norm": self.post_attention_norm,
            "post_mlp_norm": self.post_mlp_norm,
        }
        return {role: name for role, name in named.items() if name is not None}

    @cached_property
    def _plans(self) -> dict[int, LayerPlan]:
        return {}

    def sparse_plan(self, count: int) -> LayerPlan:
        """:class:`LayerPlan` of a decoder layer with ``count`` experts."""
        if count not in self._plans:
            self._plans[count] = self._sparse_plan(count)
        return self._plans[count]

    def _sparse_plan(self, count: int) -> LayerPlan:
        dense, experts = self.plan, self.experts
        if experts is None:
            raise ValueError(f"{self.model_type} has no experts")
        linears, mlp = experts.linears(count), ("gate", "up", "down")
        roles = list(dict.fromkeys(linear.partition(".")[2] for linear in linears))
        read = tuple(f"{linear}.{role}" for role in roles for linear in ("gate", "up"))
        sites = {name: dense.sites[name] for name in ("attention_input", "output_input")}
        sites["mlp_input"] = replace(
            dense.sites["mlp_input"], linears=read, readers=tuple(experts.readers), block="mlp"
        )
        sites |= {f"down_input.{r}": Site(f"down_input.{r}", (f"down.{r}",), source=f"up.{r}") for r in roles}
        kept = {role: module for role, module in dense.modules.items() if role not in mlp}
        modules = {**kept, **linears, **experts.readers}
        tensors = {role: name for role, name in dense.tensors.items() if role.removesuffix("_bias") not in mlp}
        tensors |= {role: f"{module}.weight" for role, module in {**linears, **experts.readers}.items()}
        tensors |= {f"{linear}_bias": f"{module}.bias" for linear, module in linears.items()}
        places = {name: place for name, place in experts.places(count).items() if place != Stored(name)}
        writers = {"o": dense.writers["o"], **{f"down.{role}": dense.writers["down"] for role in roles}}
        return LayerPlan(sites, modules, tensors, {**dense.stored, **places}, writers)

    @cached_property
    def plan(self) -> LayerPlan:
        """:class:`LayerPlan` of a decoder layer with an MLP."""
        whole = {linear: (module, parts) for module, parts in self.joined.items() for linear in parts}
        linears = {
            linear: f"{whole[linear][0]}.{linear}" if linear in whole else module for linear, module in _MODULES.items()
        }
        head_norms = {_head_norm_role(module): module for module in self.head_norms}
        modules = {**self.norms, **linears, **head_norms}
        tensors = {role: f"{module}.weight" for role, module in {**self.norms, **linears}.items()}
        tensors |= {f"{linear}_bias": f"{module}.bias" for linear, module in linears.items()}
        tensors |= {role: f"{module}.weight" for role, module in head_norms.items()}
        stored = {
            name: Stored(name, offset=self.gain_offset) for name in (tensors[r] for r in (*self.norms, *head_norms))
        }
        for linear, (module, parts) in whole.items():
            for kind in ("weight", "bias"):
                stored[f"{module}.{linear}.{kind}"] = Stored(f"{module}.{kind}", linear, parts)
        return LayerPlan(
            {site.name: site for site in self._sites()},
            modules,
            tensors,
            {name: place for name, place in stored.items() if place != Stored(name)},
            {
                linear: role if role in self.norms else None
                for linear, role in (("o", "post_attention_norm"), ("down", "post_mlp_norm"))
            },
        )

    def _sites(self) -> tuple[Site, ...]:
        norms = {role: role if role in self.norms else None for role in ("attention_norm", "mlp_norm")}
        return (
            Site("attention_input", SITES["attention_input"], norm=norms["attention_norm"], stream=True),
            Site("output_input", SITES["output_input"], source="v"),
            Site("mlp_input", SITES["mlp_input"], norm=norms["mlp_norm"], stream=True),
            Site("down_input", SITES["down_input"], source="up"),
        )

    def biased(self, config: Mapping) -> tuple[str, ...]:
        """Linears with a bias under a transformers ``config``."""
        given = {**self.defaults, **config}
        return tuple(
            linear for linear, key in self.biases.items() if key is True or (isinstance(key, str) and given.get(key))
        )

    def is_tied(self, config: Mapping) -> bool:
        """Whether the lm_head is the embedding under a transformers ``config``."""
        return bool({**self.defaults, **config}.get("tie_word_embeddings", False))


def _head_norm_role(module: str) -> str:
    """``q_norm`` or ``k_norm`` of a module such as ``self_attn.query_layernorm``."""
    return f"{module.rpartition('.')[2][0]}_norm"
