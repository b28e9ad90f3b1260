"""Plan of a decoder layer: its sites, and the names of its modules and tensors by role.

A *role* is the short name that the transforms use (``q``, ``attention_norm``, ...); a *site* is the
input shared by one or several linears. Names are those of the *canonical* module: transformers' own,
with joined linears taken apart and gains explicit (``canonical.py``). Plans are derived from the
families (``families.py``). Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

# kinds of sites and linears, as a config names them
SITES: dict[str, tuple[str, ...]] = {
    "attention_input": ("q", "k", "v"),
    "output_input": ("o",),
    "mlp_input": ("gate", "up"),
    "down_input": ("down",),
}
LINEARS: tuple[str, ...] = tuple(linear for linears in SITES.values() for linear in linears)
SITE_OF: dict[str, str] = {linear: site for site, linears in SITES.items() for linear in linears}
LAYER_PREFIX = "model.layers.{layer}."
END_ROLES: dict[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "positions": "model.embed_positions.weight",
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "final_norm_center": "model.norm.center",
    "lm_head": "lm_head.weight",
    "lm_head_bias": "lm_head.bias",
}
PER_TOKEN = ("embedding", "lm_head", "lm_head_bias")  # ends with a row for every token of the vocabulary


def linear_key(layer: int, linear: str) -> str:
    """Key of a linear in results, such as ``0.q``; in files it has its module's name (``shapes.module_name``)."""
    return f"{layer}.{linear}"


def kind_of(name: str) -> str:
    """Kind of a site or linear: ``down_input`` of ``down_input.17``, ``gate`` of ``gate.shared``, ``q`` of ``q.a``."""
    return name.partition(".")[0]


def is_routed(name: str) -> bool:
    """Whether a site or linear is one of a routed expert, such as ``gate.17``."""
    return name.partition(".")[2].isdecimal()


def is_in_mixture(name: str) -> bool:
    """Whether a site or linear is one of a routed or a shared expert."""
    return is_routed(name) or name.endswith(".shared")


@dataclass(frozen=True)
class Site:
    """The input shared by ``linears``.

    ``readers`` are linears that read it too and are never rounded. A division of the input can be
    folded into the norm before it (``norm``, a role) or into the rows of the linear ``source``; with
    neither it has to run online. The input is homogeneous of ``degree`` in the output of ``source``: 0
    where an activation stands between them that no factor passes; ``shifts``: a constant added to that
    output comes through unchanged; ``turns``: so does a linear map within each head. ``stream``: it reads the
    residual stream, directly or behind its norm. ``block``: the module whose input it is, if every linear sees
    some of the tokens only.
    """

    name: str
    linears: tuple[str, ...]
    readers: tuple[str, ...] = ()
    norm: str | None = None
    source: str | None = None
    degree: int = 1
    shifts: bool = False
    turns: bool = False
    stream: bool = False
    block: str = ""

    @property
    def consumers(self) -> tuple[str, ...]:
        """Every linear whose columns an operation at this site has to change."""
        return self.linears + self.readers

    @property
    def together(self) -> int:
        """Number of linears that read the same tensor one after another; experts read their own tokens."""
        kinds = {kind_of(linear) for linear in self.linears}
        return len(kinds) if self.block else len(self.linears)

    @property
    def is_divisible(self) -> bool:
        """Whether a division of the input can be folded into the weights before it."""
        return self.norm is not None or (self.source is not None and self.degree > 0)


@dataclass(frozen=True)
class Latent:
    """Narrow input of ``linears`` of attention, which another linear computes and the module ``norm`` normalizes.

    ``size``: the field of the model's shape with its width.
    """

    name: str
    norm: str
    linears: tuple[str, ...]
    size: str

    @property
    def site(self) -> str:
        return f"attention_input.{self.name}"

    @property
    def norm_role(self) -> str:
        return f"{self.name}_norm"


@dataclass(frozen=True)
class Stored:
    """Place of a canonical tensor in the checkpoint.

    The tensor ``name``, or its rows of ``part`` if it holds those of ``parts`` (linears) one after
    another, ``by_head``: head by head, ``by_row``: row by row; ``transposed``: its columns instead of its
    rows; ``index``: only this entry of its first dimension. ``offset`` is added to the values read.
    Without a name: a constant (1,), ``offset``.
    """

    name: str
    part: str = ""
    parts: tuple[str, ...] = ()
    offset: float = 0.0
    by_head: bool = False
    by_row: bool = False
    transposed: bool = False
    index: int | None = None


@dataclass(frozen=True)
class Kept:
    """Tensor of a layer that no transform changes and nothing rounds: sinks, biases of a router's choice.

    ``name`` below the layer, ``stored`` in the checkpoint; its ``dimensions`` are numbers or fields of the
    model's shape.
    """

    name: str
    dimensions: tuple[int | str, ...]
    stored: str = ""

    @property
    def place(self) -> Stored:
        return Stored(self.stored or self.name)


@dataclass(frozen=True)
class LayerPlan:
    """Parts of a decoder layer: its sites, and the names of modules and tensors by role.

    ``writers`` maps the linears that add to the residual stream to the role of the norm behind them,
    or None. ``tensors`` maps roles to canonical tensor names below the layer (every linear has a bias
    name: a shift adds missing biases), ``stored`` canonical names to their place in the checkpoint.
    ``caches``: its attention keeps keys and values of every token, no state in their place.
    """

    sites: Mapping[str, Site]
    modules: Mapping[str, str]
    tensors: Mapping[str, str]
    stored: Mapping[str, Stored]
    writers: Mapping[str, str | None]
    attention: str = "self_attn"
    kept: tuple[Kept, ...] = ()
    caches: bool = True

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for site in self.sites.values() for linear in site.linears)

    @cached_property
    def site_of(self) -> dict[str, str]:
        """Linear -> name of the site that it reads."""
        return {linear: site.name for site in self.sites.values() for linear in site.consumers}

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Roles of the norms that a transform may change: those before the sites."""
        return tuple(site.norm for site in self.sites.values() if site.norm is not None)

    @cached_property
    def post_norms(self) -> tuple[str, ...]:
        """Roles of the norms between a linear and the residual stream."""
        return tuple(norm for norm in self.writers.values() if norm is not None)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Linears that read a site and are never rounded: routers and gates of shared experts."""
        return tuple(reader for site in self.sites.values() for reader in site.readers)

    @cached_property
    def expert_sites(self) -> tuple[str, ...]:
        """Names of the sites that only the tokens of one expert reach."""
        return tuple(filter(is_routed, self.sites))

    def sites_of(self, kinds: Iterable[str]) -> list[str]:
        """Names of the sites of ``kinds``, kind by kind."""
        return [name for kind in kinds for name in self.sites if kind_of(name) == kind]

    def linears_of(self, kinds: Iterable[str]) -> list[str]:
        """Names of the linears of ``kinds``, kind by kind."""
        return [name for kind in kinds for name in self.linears if kind_of(name) == kind]

    @property
    def stream_sites(self) -> list[Site]:
        """The sites that read the residual stream."""
        return [site for site in self.sites.values() if site.stream]
