"""Canonical modules: transformers' decoders with joined linears and experts taken apart and gains explicit.

The modules are replaced before any weight is read, so that every linear and every gain of a plan is
one parameter with one name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .families import FAMILIES
from .family import Family
from .shapes import ModelShape, shape_from_config


class GainNorm(nn.Module):
    """RMSNorm with an explicit gain, for families that store the gain minus one.

    Arithmetic is float32 or wider, as in transformers' norms of these families.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty_like(norm.weight)), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (*batch, n)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(wide.dtype)).type_as(x)


class Joined(nn.ModuleDict):
    """Linears with one input whose outputs are concatenated: one linear of transformers."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (*batch, n) -> (*batch, sum of m)."""
        return torch.cat([linear(x) for linear in self.values()], -1)


class Expert(nn.Module):
    """One expert: its linears, and the activation between them."""

    def __init__(self, hidden_size: int, size: int, activation: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden_size, size, bias=False, device="meta")
        self.down_proj = nn.Linear(size, hidden_size, bias=False, device="meta")
        self.activation = activation

    def inner(self, x: Tensor) -> Tensor:
        """Input of ``down_proj`` (tokens, size) for ``x`` (tokens, hidden size)."""
        return self.activation(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))


def routed_rows(chosen: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(places, tokens) of the rows that ``expert`` computes, in their order; ``chosen`` (tokens, k)."""
    places, tokens = torch.where(chosen.mT == expert)
    return places, tokens


class ExpertList(nn.ModuleList):
    """The routed experts of a layer: separate linears in place of one tensor for all."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts for ``hidden_states`` (tokens, d); index and weights (tokens, k)."""
        found = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            places, tokens = routed_rows(top_k_index, number)
            if len(tokens):
                output = expert(hidden_states[tokens]) * top_k_weights[tokens, places, None]
                found.index_add_(0, tokens, output.to(found.dtype))
        return found


def family_of(model: nn.Module) -> Family:
    """Family of a transformers model."""
    return FAMILIES[type(model).__name__]


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes of a transformers model."""
    return shape_from_config({**model.config.to_dict(), "architectures": [type(model).__name__]})


def canonicalize(model: nn.Module) -> nn.Module:
    """Replace joined linears and experts and implicit gains in an empty transformers model; returns it."""
    family = family_of(model)
    shape = shape_of(model)
    if family.gain_offset:
        model.model.norm = GainNorm(model.model.norm)
    for index, layer in enumerate(model.model.layers):
        if shape.is_sparse(index):
            activation, sizes = layer.mlp.experts.act_fn, (shape.hidden_size, shape.expert_size)
            layer.mlp.experts = ExpertList(Expert(*sizes, activation) for _ in range(shape.experts))
        if family.gain_offset:
            for path in (*family.norms.values(), *family.head_norms):
                layer.set_submodule(path, GainNorm(layer.get_submodule(path)))
        for path, parts in family.joined.items():
            layer.set_submodule(path, _apart(layer.get_submodule(path), parts, shape))
    return model


def _apart(linear: nn.Linear, parts: tuple[str, ...], shape: ModelShape) -> Joined:
    """Empty linears for the ``parts`` of ``linear``."""
    bias, sizes = linear.bias is not None, {part: shape.linear_size(part) for part in parts}
    return Joined({part: nn.Linear(n, m, bias, device="meta") for part, (m, n) in sizes.items()})
