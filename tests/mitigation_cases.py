"""Weights, inputs and schemes that mitigations are tested on, and GPTQ as a plain loop: the oracle."""

from __future__ import annotations

import numpy as np
import torch

from quantgrid.mitigations import columns
from quantgrid.quantizer import codebooks, find_parameters, quantize, round_values, scheme, step_size, zero_points
from quantgrid.statistics import SiteStatistics

M, N, TOKENS = 24, 96, 400
SCHEMES = {
    "int4": scheme("int4"), "int4 asymmetric": scheme("int4_asym"), "int4 tensor": scheme("int4", granularity="tensor"),
    "int4 group-16": scheme("int4", group_size=16), "int4 asymmetric group-32": scheme("int4_asym", group_size=32), "int3": scheme("int3"),
    "int8": scheme("int8"), "mse": scheme("int4", range="mse", mse_steps=20), "fp4": scheme("fp4"), "nf4": scheme("nf4"), "mxfp4": scheme("mxfp4"),
    "nvfp4": scheme("nvfp4"), "kmeans": scheme("kmeans4"), "kmeans groups": scheme("kmeans2", group_size=32),
    "exhaustive": scheme("mxfp4", range="exhaustive"), "unsigned": scheme("fp4", element="ue2m2", group_size=32),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(seed=0, m=M, n=N):
    """(m, n) float32, heavy-tailed."""
    return (normal(m, n, seed=seed) * normal(m, n, seed=seed + 1).exp()).float()


def inputs(seed=0, n=N, tokens=TOKENS):
    """(tokens, n) float64: correlated channels, some of them large."""
    mixing = torch.eye(n, dtype=torch.float64) + 0.3 * normal(n, n, seed=seed + 1) / n**0.5 + 0.5
    return normal(tokens, n, seed=seed) @ mixing * (1 + 9 * (torch.arange(n) % 17 == 3))


def with_moment(moment) -> SiteStatistics:
    """Statistics of this second moment; the rest does not matter."""
    moment = torch.as_tensor(moment, dtype=torch.float64)
    none = torch.zeros(moment.shape[:-1], dtype=torch.float64)
    return SiteStatistics(1, none, moment, none, none, none, none.unsqueeze(-2))


def damped(moment, damping=0.01):
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def energy(error, moment):
    """tr(E H Eᵀ) in float64."""
    error = error.double()
    return ((error @ moment) * error).sum().item()


def rows_that_differ(one, other) -> int:
    """Rows whose codes differ: one rounding that falls the other way changes the rest of its row."""
    return int((one.quantized.codes != other.quantized.codes).any(-1).sum())


def plain_gptq(weight, moment, of_scheme, damping=0.01, order=None):
    """Algorithm 1 of arXiv 2210.17323, column by column in float64 numpy, scales fixed beforehand: (rounded weight, its codes' tensor)."""
    n = weight.shape[1]
    order = np.arange(n) if order is None else order.numpy()
    parameters = find_parameters(weight, of_scheme)
    groups = step_size(parameters, of_scheme, weight.shape).shape[-1]
    steps = step_size(parameters, of_scheme, weight.shape).repeat_interleave(n // groups, -1)
    zeros = zero_points(parameters, of_scheme, weight.shape)
    zeros = None if zeros is None else zeros.repeat_interleave(n // groups, -1)
    books = codebooks(parameters, of_scheme, weight.shape)
    hessian = damped(moment, damping).numpy()[np.ix_(order, order)]
    inverse = np.linalg.inv(hessian)
    working, rounded = weight.double().numpy()[:, order].copy(), np.empty(weight.shape)
    for i, column in enumerate(order):
        zero = None if zeros is None else zeros[:, column]
        book = None if books is None else books[:, column * groups // n]
        zero = None if zero is None else zero[:, None]
        rounded[:, i] = round_values(torch.from_numpy(working[:, i: i + 1].copy()), steps[:, column, None], zero, of_scheme, book).numpy()[:, 0]
        error = (working[:, i] - rounded[:, i]) / inverse[i, i]
        working[:, i + 1:] -= np.outer(error, inverse[i, i + 1:])
        inverse = inverse - np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    result = np.empty(weight.shape)
    result[:, order] = rounded
    return quantize(torch.from_numpy(result).float(), of_scheme, parameters)


def recorded_gaps(monkeypatch) -> list[torch.Tensor]:
    """Fills while GPTQ runs: what every column was off from its rounded values, (rows,) float64, in the order of rounding."""
    gaps: list[torch.Tensor] = []

    def spy(column, *rest):
        rounded = round_values(column, *rest)
        gaps.append((column - rounded).double())
        return rounded

    monkeypatch.setattr(columns, "round_values", spy)
    return gaps
