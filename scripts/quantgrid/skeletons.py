"""transformers decoders without weights, and how they get them: by the names of their own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """A transformers decoder of this config whose parameters take no memory yet; buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**{"use_cache": False, **config})
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(settings)


def attention_of(model: nn.Module) -> str:
    """Name of the attention implementation that a transformers model computes with."""
    return model.config._attn_implementation


def skeleton(config: Mapping[str, Any], ends: Mapping[str, Tensor], where: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """:func:`empty_model` with embedding, final norm and lm_head from ``ends`` in ``dtype`` on ``device``, where its buffers are too; its decoder
    layers are empty. :class:`ConfigError` with the name ``where`` for an end that is missing."""
    model = empty_model(config)
    layers, model.model.layers = model.model.layers, nn.ModuleList()  # nothing that is empty can be moved to a device
    fill(model, "", ends, dtype, device)
    model.tie_weights()
    require_filled(model, "", where)
    model.to(device)
    model.model.layers = layers
    return model.eval()


def fill(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> None:
    """Give the empty parameters of ``module`` copies of those of ``tensors`` that are named as they are, behind ``prefix``."""
    wanted = [name for name, parameter in module.named_parameters() if parameter.is_meta and prefix + name in tensors]
    module.load_state_dict({name: tensors[prefix + name].to(device, dtype, copy=True) for name in wanted}, strict=False, assign=True)


def require_filled(module: nn.Module, prefix: str, where: Path) -> None:
    """:class:`ConfigError` with the name ``where`` for a parameter of ``module`` that is still empty."""
    missing = [prefix + name for name, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ConfigError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
