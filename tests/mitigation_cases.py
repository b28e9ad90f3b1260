"""Weights, inputs and schemes of the tests of mitigations; GPTQ as a plain loop, the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from quantgrid.calibration.statistics import PairedStatistics, SiteStatistics
from quantgrid.mitigations.solvers import columns
from quantgrid.quantization.compensation_storage import (
    read_low_rank,
    side_entry,
    side_tensors,
    take_outliers,
    take_residual,
)
from quantgrid.quantization.packed_linears import PackedLinear
from quantgrid.quantizer import find_parameters, quantize
from quantgrid.quantizer.rounding import round_values
from quantgrid.quantizer.tensors import codebooks, step_size, zero_points
from quantgrid.schemes import scheme
from reference_statistics import statistics_of

M, N, TOKENS = 24, 96, 400
SCHEMES = {
    "int4": scheme("int4"),
    "int4 asymmetric": scheme("int4_asym"),
    "int4 tensor": scheme("int4", granularity="tensor"),
    "int4 group-16": scheme("int4", group_size=16),
    "int4 asymmetric group-32": scheme("int4_asym", group_size=32),
    "int3": scheme("int3"),
    "int8": scheme("int8"),
    "mse": scheme("int4", range="mse", mse_steps=20),
    "fp4": scheme("fp4"),
    "nf4": scheme("nf4"),
    "mxfp4": scheme("mxfp4"),
    "nvfp4": scheme("nvfp4"),
    "kmeans": scheme("kmeans4"),
    "kmeans groups": scheme("kmeans2", group_size=32),
    "exhaustive": scheme("mxfp4", range="exhaustive"),
    "unsigned": scheme("fp4", element="ue2m2", group_size=32),
}
INT4 = SCHEMES["int4"]
METRICS = ["plain", "lqer", "qera_approx", "qera_exact"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(seed=0, m=M, n=N):
    """(m, n) float32, heavy-tailed."""
    return (normal(m, n, seed=seed) * normal(m, n, seed=seed + 1).exp()).float()


def inputs(seed=0, n=N, tokens=TOKENS):
    """(tokens, n) float64: correlated channels, some of them large."""
    mixing = torch.eye(n, dtype=torch.float64) + 0.3 * normal(n, n, seed=seed + 1) / n**0.5 + 0.5
    return normal(tokens, n, seed=seed) @ mixing * (1 + 9 * (torch.arange(n) % 17 == 3))


def paired_inputs(seed=0, noise=0.2):
    """(x, x* of the full-precision model, their statistics): the second is the first and a
    correlated error."""
    x = inputs(seed)
    wanted = x + noise * inputs(seed) @ normal(N, N, seed=seed + 7) / N**0.5
    found = statistics_of(x)
    names = ("count", "mean", "second_moment", "mean_absolute", "minimum", "maximum", "samples")
    return x, wanted, PairedStatistics(*(getattr(found, name) for name in names), cross=(wanted - x).T @ x / len(x))


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
    """Rows whose codes differ: one rounding the other way changes the rest of its row."""
    return int((one.quantized.codes != other.quantized.codes).any(-1).sum())


def plain_gptq(weight, moment, of_scheme, damping=0.01, order=None):
    """Algorithm 1 of arXiv 2210.17323, column by column in float64 numpy, scales fixed beforehand:
    (rounded weight, its codes' tensor)."""
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
        rounded[:, i] = round_values(
            torch.from_numpy(working[:, i : i + 1].copy()), steps[:, column, None], zero, of_scheme, book
        ).numpy()[:, 0]
        error = (working[:, i] - rounded[:, i]) / inverse[i, i]
        working[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
        inverse = inverse - np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    result = np.empty(weight.shape)
    result[:, order] = rounded
    return quantize(torch.from_numpy(result).float(), of_scheme, parameters)


def recorded_gaps(monkeypatch) -> list[torch.Tensor]:
    """Fills while GPTQ runs: what every column was off from its rounded values, (rows,) float64, in
    the order of rounding."""
    gaps: list[torch.Tensor] = []

    def spy(column, *rest):
        rounded = round_values(column, *rest)
        gaps.append((column - rounded).double())
        return rounded

    monkeypatch.setattr(columns, "round_values", spy)
    return gaps


def metric_factor(metric, x):
    """M of the metric |(E - L) M|, from the tokens ``x``."""
    if metric == "qera_exact":
        values, vectors = np.linalg.eigh(
            (x.T @ x / len(x)).numpy()
        )  # the symmetric root, where the library takes a Cholesky factor
        return torch.from_numpy(vectors @ np.diag(np.sqrt(values.clip(min=0))) @ vectors.T)
    return torch.diag(
        {
            "plain": torch.ones(N, dtype=torch.float64),
            "lqer": x.abs().mean(0),
            "qera_approx": x.square().mean(0).sqrt(),
        }[metric]
    )


PARTS = ("codes", "scale", "zero_point", "global_scale", "codebook")


def _of_layer(tensor, layer):
    return None if tensor is None else tensor[layer]


def roundtrip(solved, layer=0):
    """(weight without the term, term) as a checkpoint gives them back, and the bits on disk of
    everything but the codes."""
    tensors = {f"a.{name}": tensor for name, tensor in side_tensors(solved, layer).items()}
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    entry = {"shape": list(solved.quantized.codes.shape[-2:]), **side_entry(solved)}
    outliers = take_outliers("a", entry, tensors)
    codes = replace(solved.quantized, **{part: _of_layer(getattr(solved.quantized, part), layer) for part in PARTS})
    weight = PackedLinear("a", codes, outliers=outliers, residual=take_residual("a", entry, tensors)).dense()
    term_of = read_low_rank("a", entry, tensors, torch.float32)
    assert not tensors
    return weight, term_of, bits
