"""Alternating fit of codes and a low-rank term, used by ``low_rank_first`` and ``caldera``.

The pair of least output error tr((W - Ŵ) E[xxᵀ] (W - Ŵ)ᵀ) is kept, separately for each layer of a
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...quantizer.tensors import QuantizedTensor

# Term as returned by ``factors.stored_term``, with details of its fit per layer.
Term = tuple[tuple[Tensor, Tensor], tuple[QuantizedTensor, QuantizedTensor] | None, dict[str, list]]


def alternate(
    weight: Tensor,
    statistics: SiteStatistics,
    round_rest: Callable[[Tensor], Compensated],
    fit: Callable[[Compensated], Compensated],
    term: Term | None,
    iterations: int,
    early_stop: bool,
) -> Compensated:
    """Best of ``iterations`` iterations for ``weight`` (*batch, m, n).

    ``round_rest`` rounds the weight minus a term; ``fit`` adds a term for the error of given codes.
    With an initial ``term`` an iteration is scored by its codes plus the term that was subtracted
    before rounding (low rank first), without one by its codes plus the term fitted to them (codes
    first). ``early_stop``: a layer stops after an iteration that does not lower its error.
    """
    judged_first, best, lowest = term is not None, None, None
    open_layers = torch.ones(weight.shape[:-2], dtype=torch.bool, device=weight.device)
    turn_of, turns = torch.zeros_like(open_layers, dtype=torch.int64), torch.zeros_like(open_layers, dtype=torch.int64)
    for turn in range(1, iterations + 1):
        rest = weight if term is None else weight - term[0][0].float() @ term[0][1].float()
        rounded = round_rest(rest)
        found = (
            replace(rounded, low_rank=term[0], factors=term[1], details=term[2] | rounded.details)
            if judged_first
            else fit(rounded)
        )
        error = output_errors(weight - found.dequantized(), statistics)
        better = open_layers if lowest is None else open_layers & (error < lowest)
        best, lowest = (
            (found, error) if best is None else (pick(better, found, best), torch.where(better, error, lowest))
        )
        turns, turn_of = torch.where(open_layers, turn, turns), torch.where(better, turn, turn_of)
        open_layers = open_layers & better if early_stop else open_layers
        if turn == iterations or not open_layers.any():
            break
        fitted = fit(rounded) if judged_first else found
        term = (fitted.low_rank, fitted.factors, fitted.details)
    return replace(best, details=best.details | {"turn": turn_of.flatten().tolist(), "turns": turns.flatten().tolist()})


def output_errors(error: Tensor, statistics: SiteStatistics) -> Tensor:
    """tr(E C Eᵀ) (*batch,) float64 of ``error`` (*batch, m, n); products in the solver dtype."""
    moments = statistics.second_moment.reshape(-1, *statistics.second_moment.shape[-2:])
    matrices = error.reshape(-1, *error.shape[-2:])
    wide = statistics.solver_dtype
    found = [
        ((matrix.to(wide) @ moment.to(wide)) * matrix).sum(dtype=torch.float64)
        for matrix, moment in zip(matrices, moments)
    ]
    return torch.stack(found).reshape(error.shape[:-2])


def pick(mask: Tensor, one: Any, other: Any) -> Any:
    """Select per layer ``one`` where ``mask`` (*batch,) is set, else ``other``.

    Both may be tensors, dataclasses of tensors, or lists with an entry per layer.
    """
    if isinstance(one, Tensor):
        chosen = mask.reshape(*mask.shape, *[1] * (one.dim() - mask.dim()))
        bits = (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in (one, other))
        return torch.where(chosen, *bits).view(one.dtype)
    if isinstance(one, (Compensated, QuantizedTensor)):
        return replace(
            one,
            **{field.name: pick(mask, getattr(one, field.name), getattr(other, field.name)) for field in fields(one)},
        )
    if isinstance(one, tuple):
        return tuple(pick(mask, *pair) for pair in zip(one, other))
    if isinstance(one, dict):
        return {key: pick(mask, one[key], other[key]) for key in one}
    if isinstance(one, list):
        return [a if use else b for use, a, b in zip(mask.flatten().tolist(), one, other)]
    return one
