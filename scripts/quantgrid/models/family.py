"""Description of a decoder family, and the plan of a layer that follows from it.

A plan says which sites a layer has, where an operation can be folded, and in which tensor of the
checkpoint each role lies. Standard library only: the grid reads plans when the DAG is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .mixtures import Experts
from .plans import END_ROLES, SITES, Kept, Latent, LayerPlan, Site, Stored, kind_of

_MODULES: dict[str, str] = {
    **{linear: f"self_attn.{linear}_proj" for linear in ("q", "k", "v", "o")},
    **{linear: f"mlp.{linear}_proj" for linear in ("gate", "up", "down")},
}


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

    ``modules`` maps linears to their modules in a layer, or to "" if it has none; ``attention`` is the module
    of the attention. ``latents``: narrow inputs of linears of attention, for queries only without the module
    ``q`` (:attr:`direct`).
    ``gated``: the MLP has a gate; without one ``degree`` is the homogeneity of its activation, 0 for none.
    ``centered``: norms subtract the mean of the channels (LayerNorm); ``norm_bias``: they add a bias.
    ``parallel``: one norm feeds attention and MLP, whose outputs are added to the stream together.
    ``by_head``: joined linears are stored head by head; ``transposed``: linears are stored transposed.
    ``names`` maps canonical modules outside of the layers to transformers', ``files`` those that have
    another name in files. ``positions``: rows of the table of positions beyond
    ``max_position_embeddings``, None without a table. ``head_bias``: the lm_head has a bias.
    ``keys`` maps keys of config.json to the family's, or to "" if it does not read them; ``inner`` is the
    width of the MLP in units of the hidden size, for a config.json that leaves it out. ``only`` maps keys
    to the one value that is supported and to what stands in the way of others; ``ignored`` lists tensors in
    files that nothing reads, as regular expressions. ``kept`` are tensors of a layer that nothing changes.
    ``sinks``: the weights of attention do not sum to 1. ``head_norms_key``: the key of config.json that gives
    the layers ``head_norms``. ``output_gate``: the outputs of attention are multiplied by a gate, which ``q``
    computes too, head by head.

    ``linear`` has the fields of layers with linear attention (:attr:`recurrent`), such as ``readers``: linears that
    read the input of attention and are never rounded, and ``output_norm``: a norm of every head of the outputs.
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
    modules: Mapping[str, str] = field(default_factory=dict)
    latents: tuple[Latent, ...] = ()
    attention: str = "self_attn"
    gated: bool = True
    degree: int = 1
    centered: bool = False
    norm_bias: bool = False
    parallel: bool = False
    by_head: bool = False
    transposed: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    positions: int | None = None
    head_bias: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    inner: int | None = None
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    sinks: bool = False
    head_norms_key: str = ""
    output_gate: bool = False
    linear: Mapping[str, Any] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    output_norm: str = ""

    @cached_property
    def linears(self) -> dict[str, str]:
        """Linear -> its module in transformers' layer; joined ones have a module together."""
        named = {**_MODULES, **self.modules}
        return {linear: module for linear, module in named.items() if module and (self.gated or linear != "gate")}

    @cached_property
    def direct(self) -> Family:
        """Family of a config.json without a latent input for queries: one linear computes them."""
        modules = {linear: module for linear, module in self.modules.items() if kind_of(linear) != "q"}
        latents = tuple(latent for latent in self.latents if latent.size != "query_rank")
        return replace(self, modules=modules, latents=latents)

    @cached_property
    def recurrent(self) -> Family:
        """Family of the layers with linear attention."""
        return replace(self, **{"linear": {}, **self.linear})

    @cached_property
    def stacked(self) -> Family:
        """Family of files in which one tensor holds all experts of a layer."""
        return replace(self, experts=self.experts and self.experts.stacked)

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

    def plan_of(self, experts: int) -> LayerPlan:
        """:class:`LayerPlan` of a decoder layer with ``experts``, or with an MLP for none."""
        if experts not in self._plans:
            self._plans[experts] = self._sparse_plan(experts) if experts else self.plan
        return self._plans[experts]

    def _sparse_plan(self, count: int) -> LayerPlan:
        dense, experts = self.plan, self.experts
        if experts is None:
            raise ValueError(f"{self.model_type} has no experts")
        linears, mlp = experts.linears(count), ("gate", "up", "down")
        roles = list(dict.fromkeys(linear.partition(".")[2] for linear in linears))
        read = tuple(f"{linear}.{role}" for role in roles for linear in ("gate", "up"))
        sites = {name: site for name, site in dense.sites.items() if name not in ("mlp_input", "down_input")}
        sites["mlp_input"] = replace(
            dense.sites["mlp_input"], linears=read, readers=tuple(experts.readers), block=experts.block
        )
        down = dense.sites["down_input"]
        sites |= {
            f"down_input.{r}": replace(down, name=f"down_input.{r}", linears=(f"down.{r}",), source=f"up.{r}")
            for r in roles
        }
        kept = {role: module for role, module in dense.modules.items() if role not in mlp}
        modules = {**kept, **linears, **experts.readers}
        tensors = {role: name for role, name in dense.tensors.items() if role.removesuffix("_bias") not in mlp}
        tensors |= {role: f"{module}.weight" for role, module in {**linears, **experts.readers}.items()}
        tensors |= {f"{linear}_bias": f"{module}.bias" for linear, module in linears.items()}
        tensors |= {"router_bias": f"{experts.router}.bias"} if experts.biased else {}
        tensors |= {kept.name: kept.name for kept in experts.kept}
        places = {**experts.places(count), **{kept.name: kept.place for kept in experts.kept}}
        places = {name: place for name, place in places.items() if place != Stored(name)}
        writers = {linear: norm for linear, norm in dense.writers.items() if linear != "down"}
        writers |= {f"down.{role}": dense.writers["down"] for role in roles}
        return replace(
            dense,
            sites=sites,
            modules=modules,
            tensors=tensors,
            stored={**dense.stored, **places},
            writers=writers,
            kept=(*dense.kept, *experts.kept),
        )

    @cached_property
    def plan(self) -> LayerPlan:
        """:class:`LayerPlan` of a decoder layer with an MLP."""
        whole = {linear: module for module, parts in self.joined.items() for linear in parts}
        linears = {
            linear: f"{whole[linear]}.{kind_of(linear)}" if linear in whole else module
            for linear, module in self.linears.items()
        }
        inner_norms = {_head_norm_role(module): module for module in self.head_norms}
        inner_norms |= {latent.norm_role: latent.norm for latent in self.latents}
        inner_norms |= {"output_norm": self.output_norm} if self.output_norm else {}
        weighted = {**self.norms, **linears, **inner_norms, **self.readers}
        tensors = {role: f"{module}.weight" for role, module in weighted.items()}
        tensors |= {f"{linear}_bias": f"{module}.bias" for linear, module in linears.items()}
        for part in self.norm_parts:
            tensors |= {f"{role}_{part}": f"{module}.{part}" for role, module in self.norms.items()}
        tensors |= {kept.name: kept.name for kept in self.kept}
        stored = {**self._stored_norms(), **self._stored_linears(), **{kept.name: kept.place for kept in self.kept}}
        return LayerPlan(
            {site.name: site for site in self._sites()},
            weighted,
            tensors,
            {name: place for name, place in stored.items() if place != Stored(name)},
            {
                linear: role if role in self.norms else None
                for linear, role in ((self._output, "post_attention_norm"), ("down", "post_mlp_norm"))
            },
            self.attention,
            self.kept,
            caches=not self.output_norm,
        )

    @property
    def _output(self) -> str:
        return next(linear for linear in self.linears if kind_of(linear) == "o")

    @property
    def norm_parts(self) -> tuple[str, ...]:
        """Tensors of a norm besides its gain: ``center`` is the share of the mean that it subtracts."""
        return ("bias",) * self.norm_bias + ("center",) * self.centered

    def _stored_norms(self) -> dict[str, Stored]:
        """Canonical tensor name -> place, of the norms in a layer."""
        modules = {module: module for module in (*self.norms.values(), *self.head_norms)}
        if self.parallel:
            modules[self.norms["mlp_norm"]] = self.norms["attention_norm"]
        return {name: place for module, own in modules.items() for name, place in self.norm_places(module, own).items()}

    def norm_places(self, module: str, stored: str) -> dict[str, Stored]:
        """Canonical tensor name -> place, of the norm ``module`` that is stored as ``stored``."""
        places = {f"{module}.weight": Stored(f"{stored}.weight", offset=self.gain_offset)}
        places |= {f"{module}.bias": Stored(f"{stored}.bias")} if self.norm_bias else {}
        return places | ({f"{module}.center": Stored("", offset=1.0)} if self.centered else {})

    def _stored_linears(self) -> dict[str, Stored]:
        """Canonical tensor name -> place, of the linears in a layer."""
        joined = {linear: (module, parts) for module, parts in self.joined.items() for linear in parts}
        found = {}
        for linear, own in self.linears.items():
            stored, parts = joined.get(linear, (own, ()))
            part, module = (linear, f"{stored}.{kind_of(linear)}") if parts else ("", own)
            place = Stored(f"{stored}.bias", part, parts, by_head=self.by_head and bool(parts))
            found[f"{module}.bias"] = place
            found[f"{module}.weight"] = replace(place, name=f"{stored}.weight", transposed=self.transposed)
        return found

    def _sites(self) -> tuple[Site, ...]:
        norms = {role: role if role in self.norms else None for role in ("attention_norm", "mlp_norm")}
        read = tuple(linear for linear in SITES["mlp_input"] if linear in self.linears)
        behind = [linear for latent in self.latents for linear in latent.linears]
        attention = [linear for linear in self.linears if kind_of(linear) in SITES["attention_input"]]
        first = tuple(linear for linear in attention if linear not in behind)
        return (
            Site("attention_input", first, tuple(self.readers), norm=norms["attention_norm"], stream=True),
            *(Site(latent.site, latent.linears, norm=latent.norm_role) for latent in self.latents),
            self._output_site(),
            Site("mlp_input", read, norm=norms["mlp_norm"], stream=True),
            Site("down_input", SITES["down_input"], source="up", degree=self.degree),
        )

    def _output_site(self) -> Site:
        site = Site(f"output_input{self._output.removeprefix('o')}", (self._output,))
        if self.output_norm:
            return replace(site, norm="output_norm")
        return replace(site, source="v", shifts=not (self.sinks or self.output_gate), turns=not self.output_gate)

    @cached_property
    def ends(self) -> dict[str, Stored]:
        """Canonical name -> place of the tensors outside of the layers, in the order of ``END_ROLES``."""
        norm = END_ROLES["final_norm"].removesuffix(".weight")
        found = {END_ROLES["embedding"]: Stored(END_ROLES["embedding"])}
        if self.positions is not None:
            found[END_ROLES["positions"]] = Stored(END_ROLES["positions"])
        found |= self.norm_places(norm, norm)
        roles = ("lm_head", "lm_head_bias") if self.head_bias else ("lm_head",)
        return {**found, **{END_ROLES[role]: Stored(END_ROLES[role]) for role in roles}}

    def value(self, config: Mapping, key: str) -> Any:
        """Value of a ``key`` under its name in this family; None if config.json and defaults have none."""
        return {**self.defaults, **config}.get(self.keys.get(key, key))

    def in_files(self, name: str) -> str:
        """Name in the files of this family of the tensor ``name``, which has canonical modules."""
        known = {**self.names, **self.files}
        stem = max((stem for stem in known if f"{name}.".startswith(f"{stem}.")), key=len, default="")
        return known[stem] + name.removeprefix(stem) if stem else name

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
