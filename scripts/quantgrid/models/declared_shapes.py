"""Shapes that a config entry declares for a model that has to be fetched. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from .architectures import architecture_of
from .families import FAMILIES
from .shapes import ModelShape
from .size_keys import LATENT_KEYS, LINEAR_KEYS, require_size

# optional in a declared shape: the longest window, known before the model is fetched
POSITIONS = "positions"
SHAPE_KEYS = tuple(field.name for field in fields(ModelShape) if field.type != "bool")  # sizes, not the layout of files
_OF_LATENTS = tuple(LATENT_KEYS.values())  # of latent attention, "query_rank" of some
_OF_LINEAR = (*LINEAR_KEYS.values(), "linear_layers")  # of linear attention
_OF_EXPERTS = tuple(
    field.name
    for field in fields(ModelShape)
    if field.default is not MISSING and field.name in SHAPE_KEYS and field.name not in (*_OF_LATENTS, *_OF_LINEAR)
)  # of mixtures
_LISTS = ("dense_layers", "linear_layers")


def declared_shape(shape: Mapping[str, Any], where: str) -> ModelShape:
    """Shape of a config entry; :class:`ConfigError` for keys that do not belong to its architecture."""
    unknown = [key for key in shape if key not in (*SHAPE_KEYS, POSITIONS)]
    if unknown:
        raise ConfigError(f"{where}: {unknown_name('key', unknown[0], (*SHAPE_KEYS, POSITIONS))}")
    _require_keys(shape, [key for key in SHAPE_KEYS if key not in _OF_EXPERTS + _OF_LATENTS + _OF_LINEAR], where)
    for key in shape:
        if key not in ("architecture", *_LISTS):
            require_size(shape[key], f"{where}.{key}")
    family = FAMILIES[architecture_of({"architectures": [shape["architecture"]]}, f"{where}.architecture")]
    if family.latents:
        _require_keys(shape, [key for key in _OF_LATENTS if key != "query_rank"], where)
    elif extra := next((key for key in _OF_LATENTS if key in shape), None):
        raise ConfigError(f"{where}.{extra}: {shape['architecture']} has no latent attention")
    if family.linear:
        _require_keys(shape, list(_OF_LINEAR), where)
    elif extra := next((key for key in _OF_LINEAR if key in shape), None):
        raise ConfigError(f"{where}.{extra}: {shape['architecture']} has no linear attention")
    experts = family.experts
    if experts is None:
        if extra := next((key for key in _OF_EXPERTS if key in shape), None):
            raise ConfigError(f"{where}.{extra}: {shape['architecture']} has no experts")
    else:
        needed = [key for key in _OF_EXPERTS if key != "dense_layers" and (key != "shared_size" or experts.shared)]
        _require_keys(shape, needed, where)
    lists = {key: _layer_numbers(shape.get(key, []), shape["layers"], f"{where}.{key}") for key in _LISTS}
    return ModelShape(**{**{key: shape[key] for key in SHAPE_KEYS if key in shape}, **lists})


def _require_keys(shape: Mapping[str, Any], keys: list[str], where: str) -> None:
    if missing := [key for key in keys if key not in shape]:
        raise ConfigError(
            f"{where}: the keys {', '.join(missing)} are missing; a model that has to be fetched needs all of them"
        )


def _layer_numbers(numbers: Any, layers: int, where: str) -> tuple[int, ...]:
    """Numbers of layers, in order."""
    if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < layers for number in numbers):
        raise ConfigError(f"{where}: {numbers!r:.60} is not a list of layers from 0 to {layers - 1}")
    return tuple(sorted(set(numbers)))
