"""Key-value cache: rounding of keys (after rotary positions) and values, and rotation R3.

Keys and values are rounded per token and head. The attention of a model is selected by name
(transformers' ``AttentionInterface``): the one registered here passes queries, keys and values
through the :class:`KeyValues` of its module to the implementation that the model had before. Each token is rounded
independently, so a full window without a cache equals decoding from a rounded cache. R3 (QuaRot,
arXiv 2404.00456; SpinQuant, 2405.16406) preserves the products of queries and keys and spreads the
outlier channels of keys before they are rounded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..linalg.hadamard import apply_hadamard
from ..models.canonical import shape_of
from ..models.skeletons import attention_of
from ..schemes.cell_schemes import KeyValueScheme
from .linear import Rounding

ATTENTION = "quantgrid-"  # followed by the name of the implementation that computes the scores


class KeyValues(nn.Module):
    """Optional Hadamard rotation of queries and keys, and rounding of keys and values."""

    def __init__(self, rounding: Rounding | None, rotate_keys: bool):
        super().__init__()
        self.rounding, self.rotate_keys = rounding, rotate_keys

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Process tensors (*batch, tokens, head_dim) after rotary positions; shapes are
        unchanged."""
        if self.rotate_keys:
            query, key = apply_hadamard(query), apply_hadamard(key)
        return (query, key, value) if self.rounding is None else (query, self.rounding(key), self.rounding(value))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Run transformers' attention on the outputs of the module's :class:`KeyValues`.

    Inputs are (batch, heads, tokens, head_dim).
    """
    attention = module.key_values.attention
    return attention(module, *module.key_values(query, key, value), attention_mask, **options)


def own_attention(module: nn.Module, name: str) -> Callable[..., Any]:
    """Attention function ``name`` of an attention module, as its model calls it.

    ``eager`` is the one of the model's own source file, which knows its softcaps and sinks.
    """
    from transformers import AttentionInterface

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[name]


def round_key_values(model: nn.Module, wanted: KeyValueScheme) -> None:
    """Enable rounded keys and values in every decoder layer of a transformers model that caches them.

    Scores, sinks and masks stay those of the implementation that the model had before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    own, shape = attention_of(model).removeprefix(ATTENTION), shape_of(model)
    AttentionInterface.register(ATTENTION + own, attend)
    AttentionMaskInterface.register(ATTENTION + own, AttentionMaskInterface()[own])
    for index, layer in enumerate(model.model.layers):
        plan = shape.plan(index)
        if not plan.caches:
            continue
        attention = layer.get_submodule(plan.attention)
        attention.key_values = KeyValues(Rounding(wanted.scheme, {}), wanted.rotate_keys)
        attention.key_values.attention = own_attention(attention, own)
    model.set_attn_implementation(ATTENTION + own)
