"""Outlier channels planted in a Llama by a function-preserving rescaling.

Large models have few channels of very large activations; small ones have hardly any. Norm gains are
scaled up and the columns of the linears that read them down; rows of ``up`` and ``v`` up and the
matching columns of ``down`` and ``o`` down. With powers of two this is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Planting:
    """Channel -> factor of the planted outliers.

    ``hidden``: residual channels after both norms of every layer. ``down``: channels between up and
    down. ``value``: channels of every key-value head.
    """

    hidden: Mapping[int, float]
    down: Mapping[int, float]
    value: Mapping[int, float]


def plant(weights: Mapping[str, Tensor], planting: Planting, layers: int, head_dim: int) -> dict[str, Tensor]:
    """Copy of a Llama state dict with planted outlier channels; the function is unchanged."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for channel, factor in planting.hidden.items():
            for norm, readers in _READERS.items():
                weights[f"{at}{norm}.weight"][channel] *= factor
                for reader in readers:
                    weights[f"{at}{reader}.weight"][:, channel] /= factor
        for channel, factor in planting.down.items():
            weights[f"{at}mlp.up_proj.weight"][channel] *= factor
            weights[f"{at}mlp.down_proj.weight"][:, channel] /= factor
        for channel, factor in planting.value.items():
            weights[f"{at}self_attn.v_proj.weight"][channel::head_dim] *= factor
            heads = torch.arange(channel, weights[f"{at}self_attn.o_proj.weight"].shape[1], head_dim)
            weights[f"{at}self_attn.o_proj.weight"][:, heads] /= factor
    return weights
