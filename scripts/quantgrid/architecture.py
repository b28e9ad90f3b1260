"""Which tensors of a decoder play which role, as tables: name -> role, per architecture.

Supported are decoders of RMSNorm, rotary positions, grouped-query attention and SwiGLU. A *role* is the short name that the
transforms use (``q``, ``attention_norm``, ...); a *site* is the input that one or several linears share. Roles that only
some checkpoints hold (biases, q/k norms, an untied ``lm_head``) are simply absent from the others.
Standard library only: the grid reads shapes at DAG-building time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, UnsupportedModel
from .storage import read_json

SITES: dict[str, tuple[str, ...]] = {
    "attention_input": ("q", "k", "v"),
    "output_input": ("o",),
    "mlp_input": ("gate", "up"),
    "down_input": ("down",),
}
LINEARS: tuple[str, ...] = tuple(linear for linears in SITES.values() for linear in linears)
SITE_OF: dict[str, str] = {linear: site for site, linears in SITES.items() for linear in linears}
NORM_OF: dict[str, str] = {"attention_input": "attention_norm", "mlp_input": "mlp_norm"}

_LAYER_ROLES: dict[str, str] = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_BIASES = {f"{role}_bias": _LAYER_ROLES[role].replace(".weight", ".bias") for role in LINEARS}
_HEAD_NORMS = {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}
END_ROLES: dict[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER_PREFIX = "model.layers.{layer}."

# Architecture (as a checkpoint's config.json names it) -> role -> tensor name below LAYER_PREFIX. Every linear has a name for a bias,
# whether or not transformers gives it one: a shift adds biases where there are none.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "LlamaForCausalLM": {**_LAYER_ROLES, **_BIASES},
    "MistralForCausalLM": {**_LAYER_ROLES, **_BIASES},
    "Qwen2ForCausalLM": {**_LAYER_ROLES, **_BIASES},
    "Qwen3ForCausalLM": {**_LAYER_ROLES, **_BIASES, **_HEAD_NORMS},
}
MODEL_TYPES: dict[str, str] = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                               "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LARGEST_SIZE = 1 << 24  # of any count in a shape
LARGEST_CONFIG = 1 << 24  # bytes of a JSON file that describes a model
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that decide what fits it. All counts, no units."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def site_size(self, site: str) -> int:
        """Input dimension of the linears at ``site``."""
        return {"output_input": self.heads * self.head_dim, "down_input": self.intermediate_size}.get(site, self.hidden_size)

    def linear_size(self, linear: str) -> tuple[int, int]:
        """(out features, in features) of a linear."""
        key_value = self.kv_heads * self.head_dim
        out = {"q": self.heads * self.head_dim, "k": key_value, "v": key_value,
               "gate": self.intermediate_size, "up": self.intermediate_size}.get(linear, self.hidden_size)
        return out, self.site_size(SITE_OF[linear])


def architecture_of(config: Mapping, where: str = "config.json") -> str:
    """Name of the architecture in a transformers ``config``; raises :class:`UnsupportedModel` with what to add."""
    named, model_type = config.get("architectures") or [], config.get("model_type", "")
    if not (isinstance(named, list) and all(isinstance(name, str) for name in [*named, model_type])):
        raise ConfigError(f"{where}: 'architectures' has to be a list of names and 'model_type' a name, not {named!r} and {model_type!r}")
    name = (named or [MODEL_TYPES.get(model_type, "")])[0]
    if "Moe" in name or "Mixtral" in name or "moe" in model_type or any(config.get(k) for k in _EXPERT_KEYS):
        raise UnsupportedModel(f"{where}: {name or model_type} is a mixture of experts, which quantgrid does not quantize; "
                               f"supported are the dense decoders {', '.join(ARCHITECTURES)}")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(f"{where}: unknown architecture '{name or model_type}'; supported: {', '.join(ARCHITECTURES)}. "
                               "Add its role table to ARCHITECTURES in scripts/quantgrid/architecture.py")
    return name


def shape_from_config(config: Mapping, where: str = "config.json") -> ModelShape:
    """The :class:`ModelShape` that a transformers ``config`` (the parsed config.json) declares."""
    architecture = architecture_of(config, where)
    sizes = {name: _size(config, key, where) for name, key in _CONFIG_KEYS.items()}
    kv_heads = _size(config, "num_key_value_heads", where) if config.get("num_key_value_heads") is not None else sizes["heads"]
    head_dim = _size(config, "head_dim", where) if config.get("head_dim") is not None else sizes["hidden_size"] // sizes["heads"]
    if not head_dim or sizes["heads"] % kv_heads:
        raise ConfigError(f"{where}: {sizes['heads']} heads do not go with a hidden_size of {sizes['hidden_size']} and {kv_heads} key-value heads")
    return ModelShape(architecture=architecture, kv_heads=kv_heads, head_dim=head_dim, **sizes)


_CONFIG_KEYS = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
                "vocabulary": "vocab_size"}


def _size(config: Mapping, key: str, where: str) -> int:
    if key not in config:
        raise ConfigError(f"{where}: the key '{key}' is missing; a decoder's config.json states it")
    return require_size(config[key], f"{where}: {key}")


def require_size(value: object, named: str) -> int:
    """``value`` where it is a size that a decoder can have; else :class:`ConfigError` beginning with ``named``."""
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        shown = f"{value!r:.40}" if type(value) is not int or abs(value) < 10**40 else "a number of more than 40 digits"
        raise ConfigError(f"{named}: {shown} is not a whole number above 0 and up to {LARGEST_SIZE}")
    return value


def shape_from_folder(folder: str | Path) -> ModelShape:
    """The shape of the model in ``folder``, from its config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a model folder holds config.json, *.safetensors and a tokenizer")
    return shape_from_config(read_json(path, "it describes the model", LARGEST_CONFIG), str(path))


def layer_tensors(architecture: str, layer: int) -> dict[str, str]:
    """role -> full tensor name for one decoder layer."""
    prefix = LAYER_PREFIX.format(layer=layer)
    return {role: prefix + name for role, name in ARCHITECTURES[architecture].items()}


def linear_module(linear: str) -> str:
    """Module path of a linear below its decoder layer, such as ``self_attn.q_proj``."""
    return _LAYER_ROLES[linear].removesuffix(".weight")


def layer_weights(shape: ModelShape) -> int:
    """Weights of the linears of one decoder layer."""
    return sum(rows * columns for rows, columns in map(shape.linear_size, LINEARS))


def layer_moments(shape: ModelShape) -> int:
    """Entries of the second moments of the inputs of one decoder layer."""
    return sum(shape.site_size(site) ** 2 for site in SITES)
