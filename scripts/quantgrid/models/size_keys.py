"""Sizes in a config.json: those of experts and of latent attention. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ground.errors import ConfigError
from .families import COUNT_KEYS, FAMILIES
from .mixtures import Experts

LARGEST_SIZE = 1 << 24  # maximum of any count in a shape
# keys of config.json of latent attention -> field of the shape
LATENT_KEYS = {
    "q_lora_rank": "query_rank",
    "kv_lora_rank": "key_value_rank",
    "qk_nope_head_dim": "plain_key_dim",
    "qk_rope_head_dim": "rotary_dim",
}
# keys of config.json of linear attention -> field of the shape
LINEAR_KEYS = {
    "linear_num_value_heads": "linear_heads",
    "linear_num_key_heads": "linear_key_heads",
    "linear_value_head_dim": "linear_head_dim",
    "linear_key_head_dim": "linear_key_dim",
    "linear_conv_kernel_dim": "convolution",
}
ATTENTION_KINDS = ("linear_attention", "full_attention")


def linear_sizes(config: Mapping, layers: int, where: str) -> dict[str, Any]:
    """Fields of a :class:`ModelShape` that describe linear attention."""
    kinds, every = config.get("layer_types"), config.get("full_attention_interval", 4)
    if kinds is None:
        require_size(every, f"{where}: full_attention_interval")
        numbers = tuple(layer for layer in range(layers) if (layer + 1) % every)
    else:
        numbers = _listed_layers(kinds, ATTENTION_KINDS, layers, f"{where}: layer_types")
    sizes = {name: size_of(config, key, where) for key, name in LINEAR_KEYS.items()}
    if sizes["linear_heads"] % sizes["linear_key_heads"]:
        raise ConfigError(
            f"{where}: {sizes['linear_heads']} heads of values (linear_num_value_heads) are no multiple of "
            f"{sizes['linear_key_heads']} heads of keys (linear_num_key_heads)"
        )
    return {**sizes, "linear_layers": numbers} if numbers else {}


def latent_sizes(config: Mapping, where: str) -> dict[str, int]:
    """Fields of a :class:`ModelShape` that describe latent attention; the rank of queries may be null."""
    direct = "q_lora_rank" in config and config["q_lora_rank"] is None
    return {
        name: size_of(config, key, where) for key, name in LATENT_KEYS.items() if not (direct and name == "query_rank")
    }


def sparse_sizes(config: Mapping, architecture: str, layers: int, where: str) -> dict[str, Any]:
    """Fields of a :class:`ModelShape` that describe experts; empty without them."""
    experts = FAMILIES[architecture].experts
    if experts is None:
        return {}
    keys = FAMILIES[architecture].keys
    count = next((key for key in COUNT_KEYS if config.get(key) is not None), COUNT_KEYS[0])
    given = {"experts": keys.get("num_experts", count), "expert_size": experts.size}
    given["active_experts"] = keys.get("num_experts_per_tok", "num_experts_per_tok")
    given |= {"shared_size": experts.shared_size} if experts.shared_size else {}
    sizes = {name: size_of(config, key, where) for name, key in given.items()}
    if experts.shared_count:
        sizes["shared_size"] = size_of(config, experts.shared_count, where) * sizes["expert_size"]
    return {**sizes, "dense_layers": _dense_layers(experts, config, layers, where)}


def _dense_layers(experts: Experts, config: Mapping, layers: int, where: str) -> tuple[int, ...]:
    """Numbers of the layers with an MLP in the place of experts."""
    skipped = (config.get("mlp_only_layers") or []) if experts.skips else []
    every = (config.get("decoder_sparse_step") or 1) if experts.skips else 1
    first, last = (config.get(experts.leading) or 0) if experts.leading else 0, layers - 1
    if experts.listed and config.get(experts.listed) is not None:
        return _listed_layers(config[experts.listed], ("dense", "sparse"), layers, f"{where}: {experts.listed}")
    first = 1 if experts.listed else first
    if experts.interval:
        first, last, every = (config.get(key) for key in experts.interval)
        last = layers - 1 if last in (None, -1) else last
    if not all(type(number) is int and number >= 0 for number in (first, last, every)) or not every:
        raise ConfigError(f"{where}: {first!r:.40}, {last!r:.40} and {every!r:.40} are not numbers of layers")
    return tuple(
        layer for layer in range(layers) if layer in skipped or (layer + 1) % every or not first <= layer <= last
    )


def _listed_layers(kinds: object, accepted: tuple[str, str], layers: int, named: str) -> tuple[int, ...]:
    """Numbers of the layers whose entry in the list ``kinds`` is the first of those ``accepted``."""
    if not (isinstance(kinds, list) and len(kinds) >= layers and {*map(str, kinds)} <= {*accepted}):
        first, second = accepted
        raise ConfigError(f"{named}: {kinds!r:.60} is not a list of '{first}' or '{second}' for {layers} layers")
    return tuple(layer for layer in range(layers) if kinds[layer] == accepted[0])


def size_of(config: Mapping, key: str, where: str) -> int:
    """Return the size under a ``key`` of config.json; :class:`ConfigError` if there is no valid one."""
    if key not in config:
        raise ConfigError(f"{where}: the key '{key}' is missing; it is required in a decoder's config.json")
    return require_size(config[key], f"{where}: {key}")


def require_size(value: object, named: str) -> int:
    """Return ``value`` if it is a valid size of a decoder; else :class:`ConfigError` naming
    ``named``."""
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        shown = f"{value!r:.40}" if type(value) is not int or abs(value) < 10**40 else "a number of more than 40 digits"
        raise ConfigError(f"{named}: {shown} is not a whole number above 0 and up to {LARGEST_SIZE}")
    return value
