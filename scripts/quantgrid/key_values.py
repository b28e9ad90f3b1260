"""The key-value cache: keys, after their rotary positions, and values rounded per token and head; R3 on queries and keys before that.

The attention of a model is asked for by name (transformers' ``AttentionInterface``): the one registered here prepares queries, keys and
values by the :class:`KeyValues` of its module and hands them to transformers' own. Every token is rounded by itself, so that a
full window without a cache sees what decoding from a rounded cache would see. R3 (QuaRot, arXiv 2404.00456; SpinQuant, 2405.16406) leaves
the products of queries and keys as they are and spreads the outlier channels of keys before they are rounded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .architecture import linear_module
from .cell_schemes import KeyValueScheme
from .hadamard import apply_hadamard
from .linear import Rounding

ATTENTION = "quantgrid"


class KeyValues(nn.Module):
    """Queries, keys and values as attention uses them: rotated by a Hadamard matrix, keys and values rounded, as far as asked for."""

    def __init__(self, rounding: Rounding | None, rotate_keys: bool):
        super().__init__()
        self.rounding, self.rotate_keys = rounding, rotate_keys

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All (*batch, tokens, head_dim), after rotary positions; the same shapes."""
        if self.rotate_keys:
            query, key = apply_hadamard(query), apply_hadamard(key)
        return (query, key, value) if self.rounding is None else (query, self.rounding(key), self.rounding(value))


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """transformers' own attention on what the module's :class:`KeyValues` makes of its inputs (batch, heads, tokens, head_dim)."""
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"](module, *module.key_values(query, key, value), attention_mask, **options)


def round_key_values(model: nn.Module, wanted: KeyValueScheme) -> None:
    """Let every decoder layer of a transformers model attend to rounded keys and values."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])  # without it sliding windows and padding would be lost
    for layer in model.model.layers:
        attention = layer.get_submodule(linear_module("k").rpartition(".")[0])
        attention.key_values = KeyValues(Rounding(wanted.scheme, {}), wanted.rotate_keys)
    model.set_attn_implementation(ATTENTION)
