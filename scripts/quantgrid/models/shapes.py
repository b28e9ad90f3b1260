"""Sizes of a decoder, from its config.json. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..ground.errors import ConfigError, UnsupportedModel
from ..ground.storage import read_json
from .architectures import architecture_of
from .families import FAMILIES
from .family import Family
from .multimodal import STACKED, text_decoder
from .plans import LAYER_PREFIX, SITES, LayerPlan, Site
from .size_keys import latent_sizes, linear_sizes, size_of, sparse_sizes

LARGEST_CONFIG = 1 << 24  # bytes of a JSON file that describes a model


class Heads(NamedTuple):
    """``count`` heads of ``size`` channels at the input of o; an operation folded into the tensor before it
    is the same for the heads of one of the ``groups``."""

    count: int
    groups: int
    size: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. All counts, no units.

    Latent attention has ranks, that of queries 0 if one linear computes them, and keys of two parts: per
    head and without positions, and of all heads with positions. ``head_dim`` is then the size of values.
    ``stacked_experts``: a tensor of the files holds all experts of a layer, where the family has one for each.
    ``linear_layers`` have linear attention: heads of values and of keys, their sizes, and the width of the
    convolution over tokens before them.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    experts: int = 0
    active_experts: int = 0
    expert_size: int = 0
    shared_size: int = 0
    dense_layers: tuple[int, ...] = ()
    stacked_experts: bool = False

    query_rank: int = 0
    key_value_rank: int = 0
    plain_key_dim: int = 0
    rotary_dim: int = 0

    linear_layers: tuple[int, ...] = ()
    linear_heads: int = 0
    linear_key_heads: int = 0
    linear_head_dim: int = 0
    linear_key_dim: int = 0
    convolution: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Sizes by name, without those of experts that the model does not have."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default or field.default is MISSING
        }

    @property
    def family(self) -> Family:
        found = FAMILIES[self.architecture].stacked if self.stacked_experts else FAMILIES[self.architecture]
        return found.direct if found.latents and not self.query_rank else found

    def family_of(self, layer: int) -> Family:
        """Family of decoder layer ``layer``."""
        return self.family.recurrent if layer in self.linear_layers else self.family

    @property
    def key_dim(self) -> int:
        """Size of a head of queries and keys."""
        return self.plain_key_dim + self.rotary_dim if self.key_value_rank else self.head_dim

    @property
    def linear_keys(self) -> int:
        """Number of channels of the keys of linear attention."""
        return self.linear_key_heads * self.linear_key_dim

    @property
    def convolved(self) -> int:
        """Number of channels behind the convolution of linear attention: queries, keys, values."""
        return 2 * self.linear_keys + self.linear_heads * self.linear_head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` has experts in the place of an MLP."""
        return self.experts > 0 and layer not in self.dense_layers

    def plan(self, layer: int) -> LayerPlan:
        """Plan of decoder layer ``layer``."""
        return self.family_of(layer).plan_of(self.experts if self.is_sparse(layer) else 0)

    def plans(self) -> list[tuple[LayerPlan, int]]:
        """The plans of the model, each with the number of its layers."""
        linear, dense = set(self.linear_layers), set(self.dense_layers)
        both = len(linear & dense)
        counted = [
            (self.family.recurrent, self.experts, len(linear) - both),
            (self.family.recurrent, 0, both),
            (self.family, self.experts, self.layers - len(linear) - len(dense) + both),
            (self.family, 0, len(dense) - both),
        ]
        return [(family.plan_of(experts), count) for family, experts, count in counted if count]

    @property
    def has_plain_sites(self) -> bool:
        """Whether every layer has the four sites of Llama's."""
        return all({*plan.sites} == {*SITES} for plan, _ in self.plans())

    def sites(self, kind: str) -> list[Site]:
        """Sites of a ``kind`` in the plans of the model."""
        return [plan.sites[name] for plan, _ in self.plans() for name in plan.sites_of([kind])]

    def heads_at(self, site: str) -> Heads:
        """Heads at a ``site`` of the kind ``output_input``."""
        if site.endswith(".linear"):
            return Heads(self.linear_heads, 1, self.linear_head_dim)
        return Heads(self.heads, self.kv_heads, self.head_dim)

    def _inner_size(self, role: str) -> int:
        """Width between up and down of the MLP (empty ``role``) or of an expert."""
        return {"": self.intermediate_size, "shared": self.shared_size}.get(role, self.expert_size)

    def site_size(self, site: str) -> int:
        """Input dimension of the linears at ``site``."""
        kind, _, role = site.partition(".")
        if kind == "down_input":
            return self._inner_size(role)
        if latent := next((latent for latent in self.family.latents if latent.site == site), None):
            return getattr(self, latent.size)
        if kind == "output_input":
            heads = self.heads_at(site)
            return heads.count * heads.size
        return self.hidden_size

    def site_sizes(self, kind: str) -> tuple[int, ...]:
        """Input dimensions of all sites of a kind, each once."""
        return _site_sizes(self, kind)

    def widths(self, size: str) -> tuple[int, ...]:
        """Values of a size in all layers: that of the MLP may be those of experts."""
        if size in ("heads", "head_dim"):
            heads = (self.heads_at(site.name) for site in self.sites("output_input"))
            return tuple(dict.fromkeys(found.count if size == "heads" else found.size for found in heads))
        return self.site_sizes("down_input") if size == "intermediate_size" else (getattr(self, size),)

    def linear_size(self, linear: str) -> tuple[int, int]:
        """(out features, in features) of a linear."""
        kind, _, role = linear.partition(".")
        key_value, d = self.kv_heads * self.head_dim, self.hidden_size
        for found in (self._latent_sizes() if self.key_value_rank else {}, self._linear_attention_sizes()):
            if linear in found:
                return found[linear]
        if kind in ("gate", "up"):
            return self._inner_size(role), d
        if kind == "down":
            return d, self._inner_size(role)
        if kind == "o":
            return d, self.heads * self.head_dim
        queries = self.heads * self.head_dim * (2 if self.family.output_gate else 1)
        rows = {"q": queries, "k": key_value, "v": key_value, "router": self.experts}
        return rows.get(kind, 1), d

    def _linear_attention_sizes(self) -> dict[str, tuple[int, int]]:
        """(out features, in features) of the linears of linear attention."""
        if not self.linear_heads:
            return {}
        values, keys, d = self.linear_heads * self.linear_head_dim, self.linear_keys, self.hidden_size
        return {
            "q.linear": (keys, d),
            "k.linear": (keys, d),
            "v.linear": (values, d),
            "q.gate": (values, d),
            "o.linear": (d, values),
            "write": (self.linear_heads, d),
            "decay": (self.linear_heads, d),
        }

    def _latent_sizes(self) -> dict[str, tuple[int, int]]:
        """(out features, in features) of the linears of latent attention, without that of the output."""
        queries, d = self.heads * self.key_dim, self.hidden_size
        return {
            "q": (queries, d),
            "q.a": (self.query_rank, d),
            "q.b": (queries, self.query_rank),
            "k.a": (self.key_value_rank + self.rotary_dim, d),
            "k": (self.heads * self.plain_key_dim, self.key_value_rank),
            "v": (self.heads * self.head_dim, self.key_value_rank),
        }


def shape_from_config(config: Mapping, where: str = "config.json") -> ModelShape:
    """:class:`ModelShape` of a transformers ``config`` (the parsed config.json), of a multimodal one that of
    its text decoder."""
    config = text_decoder(config, where=where)
    architecture = architecture_of(config, where)
    family = FAMILIES[architecture]
    _require_only(family, config, f"{where}: {architecture}")
    config = {**family.defaults, **config}
    inner = family.keys.get("intermediate_size", "intermediate_size")
    if family.inner is not None and config.get(inner) is None:
        config[inner] = family.inner * size_of(config, family.keys.get("hidden_size", "hidden_size"), where)
    sizes = {name: size_of(config, family.keys.get(key, key), where) for name, key in _CONFIG_KEYS.items()}
    kv_key, dim_key = (family.keys.get(key, key) for key in ("num_key_value_heads", "head_dim"))
    kv_heads = size_of(config, kv_key, where) if config.get(kv_key) is not None else sizes["heads"]
    head_dim = size_of(config, dim_key, where) if config.get(dim_key) is not None else None
    head_dim = sizes["hidden_size"] // sizes["heads"] if head_dim is None else head_dim
    if not head_dim or sizes["heads"] % kv_heads:
        raise ConfigError(
            f"{where}: {sizes['heads']} heads are not compatible with a hidden_size of {sizes['hidden_size']} "
            f"and {kv_heads} key-value heads"
        )
    sparse = sparse_sizes(config, architecture, sizes["layers"], where)
    latent = latent_sizes(config, where) if family.latents else {}
    if latent and kv_heads != sizes["heads"]:
        raise ConfigError(
            f"{where}: {sizes['heads']} heads and {kv_heads} key-value heads; latent attention has as many of both"
        )
    linear = linear_sizes(config, sizes["layers"], where) if family.linear else {}
    return ModelShape(
        architecture=architecture,
        kv_heads=kv_heads,
        head_dim=head_dim,
        stacked_experts=config.get(STACKED) is True,
        **sizes,
        **sparse,
        **latent,
        **linear,
    )


def _require_only(family: Family, config: Mapping, named: str) -> None:
    """Raise :class:`UnsupportedModel` for a value of a key under which the family has other parts."""
    for key, (supported, obstacle) in family.only.items():
        if (value := config.get(key, supported)) != supported:
            raise UnsupportedModel(
                f"{named} with {key}: {value!r:.40} has {obstacle}, not supported yet; accepted: {supported!r}"
            )


_CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}


def shape_from_folder(folder: str | Path) -> ModelShape:
    """Shape of the model in ``folder``, from its config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a model folder holds config.json, *.safetensors and a tokenizer")
    return shape_from_config(read_json(path, "it describes the model", LARGEST_CONFIG), str(path))


def layer_tensors(shape: ModelShape, layer: int) -> dict[str, str]:
    """Role -> full canonical tensor name for one decoder layer."""
    prefix = LAYER_PREFIX.format(layer=layer)
    return {role: prefix + name for role, name in shape.plan(layer).tensors.items()}


def module_name(shape: ModelShape, layer: int, linear: str) -> str:
    """Full module name of a linear, such as ``model.layers.0.self_attn.q_proj``."""
    return LAYER_PREFIX.format(layer=layer) + shape.plan(layer).modules[linear]


@cache
def _site_sizes(shape: ModelShape, kind: str) -> tuple[int, ...]:
    names = [name for plan, _ in shape.plans() for name in plan.sites_of([kind])]
    return tuple(dict.fromkeys(map(shape.site_size, names)))
