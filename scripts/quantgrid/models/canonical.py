"""Canonical modules: transformers' decoders with joined linears and experts taken apart and gains explicit.

The modules are replaced before any weight is read, so that every linear and every gain of a plan is
one parameter with one name. Embedding, layers and final norm have Llama's names.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .families import FAMILIES
from .family import Family
from .plans import END_ROLES, kind_of
from .shapes import ModelShape, shape_from_config


class GainNorm(nn.Module):
    """RMSNorm with an explicit gain, for families that store the gain minus one.

    Arithmetic is float32 or wider, as in transformers' norms of these families.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(norm.weight))
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (*batch, n)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(wide.dtype)).type_as(x)


class CenteredNorm(GainNorm):
    """LayerNorm as RMSNorm of x minus ``center`` (1,) times its mean over the channels, with a bias or none.

    ``center`` is 1, or 0 on a residual stream without a mean: rotated, it has one that does not count
    (SliceGPT, arXiv 2401.15024, section 3.2).
    """

    def __init__(self, norm: nn.Module, has_bias: bool):
        super().__init__(norm)
        self.center = nn.Parameter(torch.empty(1, device=self.weight.device, dtype=self.weight.dtype))
        self.bias = nn.Parameter(torch.empty_like(self.weight)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (*batch, n)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        found = super().forward(wide - self.center.to(wide.dtype) * wide.mean(-1, keepdim=True))
        return (found if self.bias is None else found + self.bias.to(wide.dtype)).type_as(x)


class ParallelLayer(nn.Module):
    """Decoder layer whose attention and MLP read the stream behind one norm, with a copy of the norm for each.

    A transform may then change the input of one without that of the other.
    """

    def __init__(self, layer: nn.Module, norms: dict[str, str]):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.attention_norm, self.mlp_norm = (norms[role] for role in ("attention_norm", "mlp_norm"))
        for name in (self.attention_norm, self.mlp_norm):
            self.add_module(name, deepcopy(layer.get_submodule(self.attention_norm)))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """``hidden_states`` (batch, tokens, d) with the keyword arguments of transformers' layer."""
        attention, _ = self.self_attn(hidden_states=self.get_submodule(self.attention_norm)(hidden_states), **arguments)
        return hidden_states + attention + self.mlp(self.get_submodule(self.mlp_norm)(hidden_states))


class Joined(nn.ModuleDict):
    """Linears with one input whose outputs are concatenated: one linear of transformers.

    With ``heads`` the outputs are concatenated head by head.
    """

    def __init__(self, linears: dict[str, nn.Module], heads: int = 1):
        super().__init__(linears)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (*batch, n) -> (*batch, sum of m)."""
        outputs = [linear(x).unflatten(-1, (self.heads, -1)) for linear in self.values()]
        return torch.cat(outputs, -1).flatten(-2)


class Gate(nn.Module):
    """Product of the activated gate and up."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``gate`` and ``up`` (tokens, size) -> (tokens, size)."""
        return self.activation(gate) * up


class ClampedGate(nn.Module):
    """(u + 1) g sigmoid(alpha g) of gate and up within ``limit``, the gate from above only (GPT-OSS)."""

    def __init__(self, alpha: float, limit: float):
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``gate`` and ``up`` (tokens, size) -> (tokens, size)."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class Expert(nn.Module):
    """One expert: its linears, and the gate between them."""

    def __init__(self, hidden_size: int, size: int, gate: nn.Module, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias, device="meta")
        self.up_proj = nn.Linear(hidden_size, size, bias, device="meta")
        self.down_proj = nn.Linear(size, hidden_size, bias, device="meta")
        self.gate = gate

    def inner(self, x: Tensor) -> Tensor:
        """Input of ``down_proj`` (tokens, size) for ``x`` (tokens, hidden size)."""
        return self.gate(self.gate_proj(x), self.up_proj(x))

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
    if family.names:
        _rename(model, family)
    if family.gain_offset or family.centered:
        model.model.norm = _norm(model.model.norm, family)
    for index, layer in enumerate(model.model.layers):
        family = shape.family_of(index)
        if family.parallel:
            layer = model.model.layers[index] = ParallelLayer(layer, family.norms)
        if shape.is_sparse(index):
            block, mixture = layer.get_submodule(family.experts.block), family.experts
            own, sizes = block.experts, (shape.hidden_size, shape.expert_size)
            gate = ClampedGate(own.alpha, own.limit) if mixture.clamped else Gate(own.act_fn)
            block.experts = ExpertList(Expert(*sizes, gate, mixture.biased) for _ in range(shape.experts))
        if family.gain_offset or family.centered:
            for path in (*family.norms.values(), *family.head_norms):
                layer.set_submodule(path, _norm(layer.get_submodule(path), family))
        for path, parts in family.joined.items():
            layer.set_submodule(path, _apart(layer.get_submodule(path), parts, shape))
        for linear in shape.plan(index).linears if family.transposed else ():
            path, (m, n) = shape.plan(index).modules[linear], shape.linear_size(linear)
            if not isinstance(own := layer.get_submodule(path), nn.Linear):
                layer.set_submodule(path, nn.Linear(n, m, own.bias is not None, device="meta"))
    return model


def _norm(norm: nn.Module, family: Family) -> nn.Module:
    return CenteredNorm(norm, family.norm_bias) if family.centered else GainNorm(norm)


def _apart(linear: nn.Linear, parts: tuple[str, ...], shape: ModelShape) -> Joined:
    """Empty linears for the ``parts`` of ``linear``."""
    bias, sizes = linear.bias is not None, {kind_of(part): shape.linear_size(part) for part in parts}
    linears = {part: nn.Linear(n, m, bias, device="meta") for part, (m, n) in sizes.items()}
    return Joined(linears, shape.heads if shape.family.by_head else 1)


def _rename(model: nn.Module, family: Family) -> None:
    """Give the modules outside of the layers their canonical names; transformers' stay as properties."""
    path = family.names.get("model", "model")
    base = model.get_submodule(path)
    old = {own.rpartition(".")[2]: name.rpartition(".")[2] for name, own in family.names.items() if name != "model"}
    for before, after in old.items():
        base.add_module(after, base._modules.pop(before))
    first, _, below = path.partition(".")
    base.__class__ = _aliased(type(base), (*old.items(), *([(below, "")] if below else [])))
    del model._modules[first]
    model.add_module("model", base)
    model.__class__ = _aliased(type(model), ((first, "model"),) if first != "model" else ())
    model._tied_weights_keys = {END_ROLES["lm_head"]: END_ROLES["embedding"]}


@cache
def _aliased(own: type[nn.Module], aliases: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """Subclass of the same name in which attributes stand for others; one for "" is the module itself."""
    found = {name: property(attrgetter(target) if target else lambda module: module) for name, target in aliases}
    return type(own.__name__, (own,), {"__module__": own.__module__, "__qualname__": own.__qualname__, **found})
