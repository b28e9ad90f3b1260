"""transformers decoders without weights, and loading of weights by parameter name."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import ConfigError
from .canonical import canonicalize
from .plans import END_ROLES


def empty_model(config: Mapping[str, Any], ends: Container[str] = ()) -> nn.Module:
    """Canonical transformers decoder of this config, parameters on the meta device; buffers are real.

    Its lm_head has a bias if there is one among the tensors ``ends`` (names).
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**{"use_cache": False, **config})
    with init_empty_weights(include_buffers=False):
        model = canonicalize(AutoModelForCausalLM.from_config(settings))
    if END_ROLES["lm_head_bias"] in ends and model.lm_head.bias is None:
        model.lm_head.bias = nn.Parameter(torch.empty(model.lm_head.out_features, device="meta"))
    return model


def attention_of(model: nn.Module) -> str:
    """Name of the attention implementation of a transformers model."""
    return model.config._attn_implementation


def skeleton(
    config: Mapping[str, Any], ends: Mapping[str, Tensor], where: Path, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """:func:`empty_model` with embedding, final norm and lm_head from ``ends``; layers are empty.

    They are in ``dtype`` on ``device``, as are its buffers. Raises :class:`ConfigError`, naming
    ``where``, for a missing tensor.
    """
    model = empty_model(config, ends)
    # empty parameters cannot be moved to a device
    layers, model.model.layers = model.model.layers, nn.ModuleList()
    fill(model, "", ends, dtype, device)
    model.tie_weights()
    require_filled(model, "", where, ends)
    model.to(device)
    model.model.layers = layers
    return model.eval()


def fill(
    module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Copy ``tensors`` named ``prefix`` + name into the empty parameters and the persistent buffers of
    ``module``; buffers keep their dtype."""
    found: dict[str, Tensor] = {}
    buffers = dict(module.named_buffers())
    for name, held in module.state_dict(keep_vars=True).items():
        if prefix + name in tensors and (held.is_meta or name in buffers):
            found[name] = tensors[prefix + name].to(device, held.dtype if name in buffers else dtype, copy=True)
    module.load_state_dict(found, strict=False, assign=True)


def require_filled(module: nn.Module, prefix: str, where: Path, tensors: Container[str]) -> None:
    """Raise :class:`ConfigError`, naming ``where``, for a parameter of ``module`` that is still empty, or a
    persistent buffer that is not among ``tensors`` (names)."""
    buffers = dict(module.named_buffers())
    missing = [
        prefix + name
        for name, held in module.state_dict(keep_vars=True).items()
        if held.is_meta or (name in buffers and prefix + name not in tensors)
    ]
    if missing:
        raise ConfigError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
