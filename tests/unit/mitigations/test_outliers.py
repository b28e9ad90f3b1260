"""Sparse outliers and the singular domain."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mitigation_cases import (
    INT4,
    METRICS,
    SCHEMES,
    M,
    N,
    energy,
    inputs,
    metric_factor,
    roundtrip,
    weight_of,
)
from quantgrid.calibration.statistics import stack
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.mr_gptq import mr_gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.singular_domain import singular_domain
from quantgrid.mitigations.methods.sparse_outliers import affordable, sparse_outliers
from quantgrid.quantization.compensation_storage import (
    side_bits,
)
from quantgrid.quantization.layer_errors import accounted_bits
from reference_statistics import statistics_of

# -- outliers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["rtn", "gptq", "mr_gptq"])
@pytest.mark.parametrize("metric", METRICS[:3])
def test_outliers_are_the_weights_of_largest_error(base, metric):
    x, weight = inputs(), weight_of()
    statistics = statistics_of(x)
    bare = {"rtn": rtn, "gptq": gptq, "mr_gptq": mr_gptq}[base](weight, statistics, INT4)
    solved = sparse_outliers(weight, statistics, INT4, rank=2, metric=metric, base=base)
    error = (weight - bare.dequantized()).double().abs() * metric_factor(metric, x).diagonal()
    count, kept = affordable(2, weight.shape), torch.zeros(M * N, dtype=torch.bool)
    kept[solved.outliers.positions] = True
    assert solved.outliers.positions.shape == (count,) and int(kept.sum()) == count
    assert error.flatten()[kept].min() >= error.flatten()[~kept].max() * (1 - 1e-6)
    used = solved.dequantized().flatten()
    assert torch.equal(used[kept], weight.flatten()[kept].bfloat16().float()) and torch.equal(
        used[~kept], bare.dequantized().flatten()[~kept]
    )


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (576, 1536), (1, 64)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 8, 24])
def test_outliers_take_the_bytes_of_a_rank_and_no_more(shape, rank):
    count, budget = affordable(rank, shape), 16 * rank * sum(shape)
    assert 32 * count + (16 * shape[0] if rank else 0) <= budget or count == 0
    assert count == shape[0] * shape[1] or 32 * (count + 1) + 16 * shape[0] > budget


def test_outliers_come_back_from_disk_and_weigh_what_is_accounted():
    weights, statistics = (
        torch.stack([weight_of(0), weight_of(10)]),
        stack([statistics_of(inputs(0)), statistics_of(inputs(10))]),
    )
    solved = sparse_outliers(weights, statistics, SCHEMES["nvfp4"], rank=3)
    for layer in range(2):
        weight, nothing, bits = roundtrip(solved, layer)
        assert nothing is None and torch.equal(weight, solved.dequantized()[layer])
        assert math.isclose(bits, side_bits(solved) * M * N, rel_tol=1e-9) and bits <= 16 * 3 * (M + N)


def test_columns_beyond_32767_come_back():
    solved = sparse_outliers(weight_of(m=2, n=40000)[None], wide_statistics(), INT4, rank=1)
    weight, _, _ = roundtrip(solved)
    assert torch.equal(weight, solved.dequantized()[0]) and int((solved.outliers.positions % 40000).max()) > 32767


def wide_statistics():
    """Statistics of one layer of 40,000 channels. Only the diagonal of the second moment is read,
    so it is one number, expanded."""
    one = torch.ones(1, 40000, dtype=torch.float64)
    return SimpleNamespace(
        count=1,
        mean=one,
        second_moment=torch.ones(1, dtype=torch.float64).expand(1, 40000, 40000),
        mean_absolute=one,
        minimum=-one,
        maximum=one,
        samples=one[None],
        estimated=False,
    )


# -- singular domain -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "int4 group-16", "nvfp4"])
def test_the_singular_domain_lowers_the_output_error(name):
    weight, statistics = weight_of(), statistics_of(inputs())
    nearest = energy(rtn(weight, None, SCHEMES[name]).dequantized() - weight, statistics.second_moment)
    zero, some, many = (singular_domain(weight, statistics, SCHEMES[name], steps=steps) for steps in (0, 10, 60))
    assert torch.equal(zero.dequantized(), rtn(weight, None, SCHEMES[name]).dequantized())
    assert zero.details == {"step": [0], "error_to_rounding": [1.0]}
    left = [energy(solved.dequantized() - weight, statistics.second_moment) for solved in (zero, some, many)]
    assert left[0] >= left[1] >= left[2] and left[2] < 0.8 * nearest
    assert (
        math.isclose(many.details["error_to_rounding"][0], left[2] / nearest, rel_tol=1e-3)
        and 0 < many.details["step"][0] <= 60
    )
    assert accounted_bits(many, SCHEMES[name]) == accounted_bits(zero, SCHEMES[name])


def test_a_wider_band_is_more_general():
    """Of one step each, the gradient of a wider band contains that of a narrow one; a batch is its
    members one by one."""
    weights, statistics = [weight_of(seed) for seed in (0, 10)], [statistics_of(inputs(seed)) for seed in (0, 10)]
    left = [
        energy(
            singular_domain(weights[0], statistics[0], INT4, steps=60, bandwidth=width).dequantized() - weights[0],
            statistics[0].second_moment,
        )
        for width in (0, 2)
    ]
    assert left[1] < left[0]
    together = singular_domain(torch.stack(weights), stack(statistics), INT4, steps=5)
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        assert torch.equal(together.dequantized()[i], singular_domain(weight, alone, INT4, steps=5).dequantized())


def test_the_first_step_goes_along_the_gradient():
    """Straight through the rounding: the loss of W' itself, differentiated by autograd, has the
    slope that Adam's first step follows."""
    weight, statistics = weight_of(), statistics_of(inputs())
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    band = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    rounded = rtn(weight, None, INT4).dequantized().double()
    changed = u @ torch.diag(s * (1 + band)) @ v
    error = rounded - weight.double() + changed - changed.detach()
    ((error @ statistics.second_moment) * error).sum().backward()
    solved = singular_domain(weight, statistics, INT4, steps=1, learning_rate=1e-3, bandwidth=0)
    wanted = rtn((u @ torch.diag(s * (1 - 1e-3 * band.grad.sign())) @ v).float(), None, INT4)
    if solved.details["step"] == [1]:
        assert (solved.quantized.codes == wanted.quantized.codes).float().mean() > 0.999
    else:
        assert energy(wanted.dequantized() - weight, statistics.second_moment) >= energy(
            rounded - weight, statistics.second_moment
        )
