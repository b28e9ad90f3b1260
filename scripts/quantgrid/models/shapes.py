"""Sizes of a decoder, from its config.json. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError, UnsupportedModel, shortened
from ..ground.storage import read_json
from .families import FAMILIES, MODEL_TYPES, OBSTACLES
from .family import Family
from .multimodal import text_decoder
from .plans import LAYER_PREFIX, LayerPlan
from .size_keys import latent_sizes, size_of, sparse_sizes

LARGEST_CONFIG = 1 << 24  # bytes of a JSON file that describes a model
LIST = "docs/reference/models.md"  # of the supported architectures
_SUFFIX = "ForCausalLM"
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. All counts, no units.

    Latent attention has ranks, that of queries 0 if one linear computes them, and keys of two parts: per
    head and without positions, and of all heads with positions. ``head_dim`` is then the size of values.
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

    query_rank: int = 0
    key_value_rank: int = 0
    plain_key_dim: int = 0
    rotary_dim: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Sizes by name, without those of experts that the model does not have."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default or field.default is MISSING
        }

    @property
    def family(self) -> Family:
        found = FAMILIES[self.architecture]
        return found.direct if found.latents and not self.query_rank else found

    @property
    def key_dim(self) -> int:
        """Size of a head of queries and keys."""
        return self.plain_key_dim + self.rotary_dim if self.key_value_rank else self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` has experts in the place of an MLP."""
        return self.experts > 0 and layer not in self.dense_layers

    def plan(self, layer: int) -> LayerPlan:
        """Plan of decoder layer ``layer``."""
        return self.family.sparse_plan(self.experts) if self.is_sparse(layer) else self.family.plan

    def plans(self) -> list[tuple[LayerPlan, int]]:
        """The plans of the model, each with the number of its layers."""
        if not self.experts:
            return [(self.family.plan, self.layers)]
        counted = [
            (self.family.sparse_plan(self.experts), self.layers - len(self.dense_layers)),
            (self.family.plan, len(self.dense_layers)),
        ]
        return [(plan, count) for plan, count in counted if count]

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
        return self.heads * self.head_dim if kind == "output_input" else self.hidden_size

    def site_sizes(self, kind: str) -> tuple[int, ...]:
        """Input dimensions of all sites of a kind, each once."""
        return _site_sizes(self, kind)

    def widths(self, size: str) -> tuple[int, ...]:
        """Values of a size in all layers: that of the MLP may be those of experts."""
        return self.site_sizes("down_input") if size == "intermediate_size" else (getattr(self, size),)

    def linear_size(self, linear: str) -> tuple[int, int]:
        """(out features, in features) of a linear."""
        kind, _, role = linear.partition(".")
        key_value, d = self.kv_heads * self.head_dim, self.hidden_size
        if self.key_value_rank and linear in (found := self._latent_sizes()):
            return found[linear]
        if kind in ("gate", "up"):
            return self._inner_size(role), d
        if kind == "down":
            return d, self._inner_size(role)
        if kind == "o":
            return d, self.heads * self.head_dim
        rows = {"q": self.heads * self.head_dim, "k": key_value, "v": key_value, "router": self.experts}
        return rows.get(kind, 1), d

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


def architecture_of(config: Mapping, where: str = "config.json") -> str:
    """Architecture name in a transformers ``config``.

    Raises :class:`UnsupportedModel` with instructions for adding one.
    """
    named, model_type = config.get("architectures") or [], config.get("model_type", "")
    if not (isinstance(named, list) and all(isinstance(name, str) for name in [*named, model_type])):
        raise ConfigError(
            f"{where}: 'architectures' has to be a list of names and 'model_type' a name; "
            f"got {named!r} and {model_type!r}"
        )
    name = (named or [MODEL_TYPES.get(model_type, "")])[0]
    sparse = "Moe" in name or "moe" in model_type or any(config.get(key) for key in _EXPERT_KEYS)
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"{where}: {_unknown(name, model_type, sparse)}; {_listed(name or model_type)}. "
            "CONTRIBUTING.md says how to add one"
        )
    if sparse and FAMILIES[name].experts is None:
        raise UnsupportedModel(
            f"{where}: {name} is a dense decoder, and this config.json describes a mixture of experts "
            f"({', '.join(key for key in _EXPERT_KEYS if config.get(key))})"
        )
    return name


def _unknown(name: str, model_type: str, sparse: bool) -> str:
    """Reason to refuse an architecture: what stands in the way, if that is known."""
    wanted = model_type or name.removesuffix(_SUFFIX).lower()
    known = next((obstacle for begin, obstacle in OBSTACLES.items() if wanted.startswith(begin)), None)
    if known is not None:
        return f"'{shortened(name or model_type)}' has {known}, not supported yet"
    return f"{'unknown mixture of experts' if sparse else 'unknown architecture'} '{shortened(name or model_type)}'"


def _listed(name: str) -> str:
    """Number of supported architectures, where they are listed, and those whose names are like ``name``."""
    short = {family.removesuffix(_SUFFIX).lower(): family for family in FAMILIES}
    close = [short[found] for found in get_close_matches(name.removesuffix(_SUFFIX).lower(), short)]
    hint = f", with similar names {', '.join(close)}" if close else ""
    return f"{len(FAMILIES)} are supported ({LIST}){hint}"


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
    return ModelShape(architecture=architecture, kv_heads=kv_heads, head_dim=head_dim, **sizes, **sparse, **latent)


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


def layer_weights(shape: ModelShape) -> int:
    """Number of weights in the linears of the largest decoder layer."""
    return max(_weights(shape, plan) for plan, _ in shape.plans())


def all_weights(shape: ModelShape) -> int:
    """Number of weights in the linears of all decoder layers."""
    return sum(count * _weights(shape, plan) for plan, count in shape.plans())


def active_weights(shape: ModelShape) -> int:
    """Number of weights that one token is multiplied with in all decoder layers."""
    idle = 3 * (shape.experts - shape.active_experts) * shape.hidden_size * shape.expert_size
    return all_weights(shape) - idle * (shape.layers - len(shape.dense_layers))


def _weights(shape: ModelShape, plan: LayerPlan) -> int:
    return sum(rows * columns for rows, columns in map(shape.linear_size, plan.linears))


def layer_moments(shape: ModelShape) -> int:
    """Number of entries in the second moments of the inputs of the largest decoder layer."""
    return max(sum(shape.site_size(site) ** 2 for site in plan.sites) for plan, _ in shape.plans())


def held_moments(shape: ModelShape) -> int:
    """:func:`layer_moments` of what is in memory at a time: the inputs of experts follow one another."""
    found = []
    for plan, _ in shape.plans():
        sizes = {site: shape.site_size(site) ** 2 for site in plan.sites}
        one = max((sizes[site] for site in plan.expert_sites), default=0)
        found.append(sum(size for site, size in sizes.items() if site not in plan.expert_sites) + one)
    return max(found)


@cache
def _site_sizes(shape: ModelShape, kind: str) -> tuple[int, ...]:
    names = [name for plan, _ in shape.plans() for name in plan.sites_of([kind])]
    return tuple(dict.fromkeys(map(shape.site_size, names)))
