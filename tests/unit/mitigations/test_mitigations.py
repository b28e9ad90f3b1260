"""GPTQ and low-rank compensation against their definitions: the error identity, an independent
plain loop, Eckart and Young."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mitigation_cases import (
    SCHEMES,
    M,
    N,
    damped,
    energy,
    inputs,
    normal,
    plain_gptq,
    recorded_gaps,
    rows_that_differ,
    weight_of,
    with_moment,
)  # fmt: skip
from quantgrid.calibration.statistics import stack
from quantgrid.ground.errors import NumericalFailure
from quantgrid.mitigations.methods import gptq as gptq_module
from quantgrid.mitigations.methods.gptq import gptq, inverse_factor, invert_upper
from quantgrid.mitigations.methods.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.methods.low_rank import low_rank, term
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.solvers.singular import leading_directions
from quantgrid.quantizer import find_parameters, quantize
from quantgrid.schemes import scheme
from reference_statistics import statistics_of

# -- GPTQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_agrees_with_a_plain_loop(name):
    weight, statistics = weight_of(), statistics_of(inputs())
    wanted = plain_gptq(weight, statistics.second_moment, SCHEMES[name])
    found = gptq(weight, statistics, SCHEMES[name]).quantized
    assert int((found.codes != wanted.codes).any(-1).sum()) <= 1
    assert torch.equal(found.scale, wanted.scale)
    assert (found.codes != rtn(weight, None, SCHEMES[name]).quantized.codes).float().mean() > 0.02


@pytest.mark.parametrize(
    "name",
    ["int4", "int4 asymmetric", "int4 group-16", "int4 asymmetric group-32", "nvfp4", "kmeans groups", "unsigned"],
)
def test_activation_order_agrees_with_a_plain_loop(name):
    """Columns in descending order of E[x²]; each keeps the scale of the group that it lies in."""
    weight, statistics = weight_of(), statistics_of(inputs())
    order = statistics.second_moment.diagonal().argsort(descending=True)
    found = gptq(weight, statistics, SCHEMES[name], activation_order=True).quantized
    assert (
        int(
            (found.codes != plain_gptq(weight, statistics.second_moment, SCHEMES[name], order=order).codes)
            .any(-1)
            .sum()
        )
        <= 1
    )
    assert (found.codes != gptq(weight, statistics, SCHEMES[name]).quantized.codes).any()


@pytest.mark.parametrize("order", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_sum_of_errors_is_the_layer_error(name, order, monkeypatch):
    """sum |e_i|² = tr((Q - W) H_d (Q - W)ᵀ), the e_i as they were made, U from numpy."""
    gaps = recorded_gaps(monkeypatch)
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = gptq(weight, statistics, SCHEMES[name], activation_order=order)
    hessian = damped(statistics.second_moment)
    along = statistics.second_moment.diagonal().argsort(descending=True) if order else torch.arange(N)
    upper = np.linalg.cholesky(np.linalg.inv(hessian[along][:, along].numpy())).T
    total = sum((gap / upper[i, i]).square().sum().item() for i, gap in enumerate(gaps))
    assert len(gaps) == N and math.isclose(total, energy(solved.dequantized() - weight, hessian), rel_tol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_rounding_is_of_the_offset_column(name):
    """W - Q = E U, so the column that was rounded is q_i + e_i U_ii: it has to round to q_i."""
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = gptq(weight, statistics, SCHEMES[name])
    used = solved.dequantized().double()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(statistics.second_moment)), upper=True)
    errors = torch.linalg.solve_triangular(upper.T, (weight.double() - used).T, upper=False).T
    rounded = (used + errors * upper.diagonal()).float()
    again = quantize(rounded, SCHEMES[name], solved.quantized.parameters).codes
    assert (again == solved.quantized.codes).float().mean() > 0.999


@pytest.mark.parametrize("order", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_diagonal_moment_is_round_to_nearest(name, order):
    weight = weight_of()
    diagonal = with_moment(torch.diag(normal(N, seed=3).square() + 0.01))
    solved, nearest = gptq(weight, diagonal, SCHEMES[name], activation_order=order), rtn(weight, None, SCHEMES[name])
    assert torch.equal(solved.quantized.codes, nearest.quantized.codes) and torch.equal(
        solved.dequantized(), nearest.dequantized()
    )


@pytest.mark.parametrize("order", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("name", ["int4", "int4 asymmetric group-32", "nvfp4"])
def test_block_size_changes_nothing(name, order):
    weight, statistics = weight_of(n=160), statistics_of(inputs(n=160))
    solved = [
        gptq(weight, statistics, SCHEMES[name], block_size=size, activation_order=order)
        for size in (1, 7, 16, 32, 64, 128, 512)
    ]
    assert all(rows_that_differ(solved[0], other) <= 1 for other in solved)


def permuted(statistics, order):
    return with_moment(statistics.second_moment[order][:, order])


@pytest.mark.parametrize(
    "name, group", [("int4", N), ("int4 asymmetric", N), ("int4 tensor", N), ("int4 group-16", 16), ("nvfp4", 16)]
)
def test_activation_order_makes_the_order_of_channels_irrelevant(name, group):
    """Channels permuted within their groups; without activation order the result changes."""
    weight, statistics = weight_of(), statistics_of(inputs())
    order = torch.cat(
        [start + torch.randperm(group, generator=torch.Generator().manual_seed(start)) for start in range(0, N, group)]
    )
    for options, differing in (({"activation_order": True}, range(2)), ({}, range(M // 2, M + 1))):
        here = gptq(weight, statistics, SCHEMES[name], **options).quantized.codes
        there = gptq(weight[:, order], permuted(statistics, order), SCHEMES[name], **options).quantized.codes
        assert int((here[:, order] != there).any(-1).sum()) in differing


def test_the_worked_example():
    """Of W = [.4, .4] with step 1 and H = [[2, 1.8], [1.8, 2]] GPTQ makes [0, 1] (loss .176),
    rounding [0, 0] (1.216). A second row sets the step."""
    weight, moment = torch.tensor([[0.4, 0.4], [7.0, 0.0]]), torch.tensor([[2.0, 1.8], [1.8, 2.0]], dtype=torch.float64)
    found = gptq(weight, with_moment(moment), scheme("int4", granularity="tensor"), damping=0.0)
    nearest = rtn(weight, None, scheme("int4", granularity="tensor"))
    assert found.quantized.codes.tolist() == [[0, 1], [7, 0]] and nearest.quantized.codes.tolist() == [[0, 0], [7, 0]]
    losses = [energy((solved.dequantized() - weight)[:1], moment) for solved in (found, nearest)]
    assert [round(loss, 6) for loss in losses] == [0.176, 1.216] and found.details == {"damping": [0.0]}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["int4", "int4 group-16", "fp4", "mxfp4", "nvfp4"])
def test_the_layer_error_is_below_rounding(name, seed):
    """On the statistics themselves, without damping, summed over the layer (single rows may be
    worse)."""
    weight, statistics = weight_of(10 * seed), statistics_of(inputs(10 * seed))
    solved, nearest = (
        energy(done.dequantized() - weight, statistics.second_moment)
        for done in (gptq(weight, statistics, SCHEMES[name]), rtn(weight, None, SCHEMES[name]))
    )
    assert solved < 0.9 * nearest


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric group-32", "int4 tensor", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "activation order"])
def test_a_batch_is_its_members_one_by_one(name, order):
    weights, statistics = (
        [weight_of(seed) for seed in (0, 10, 20)],
        [statistics_of(inputs(seed)) for seed in (0, 10, 20)],
    )
    together = gptq(torch.stack(weights), stack(statistics), SCHEMES[name], activation_order=order)
    assert together.details == {"damping": [0.01] * 3}
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        alone = gptq(weight, alone, SCHEMES[name], activation_order=order)
        assert int((together.quantized.codes[i] != alone.quantized.codes).any(-1).sum()) <= 1
        assert torch.equal(together.quantized.scale[i], alone.quantized.scale)


def test_linears_of_a_site_share_its_factor(monkeypatch):
    calls, statistics = [], statistics_of(inputs())
    monkeypatch.setattr(gptq_module, "inverse_factor", lambda *given: calls.append(given) or inverse_factor(*given))
    for seed, of_scheme in ((0, "int4"), (5, "int4"), (5, "nvfp4")):
        gptq(weight_of(seed), statistics, SCHEMES[of_scheme])
    assert len(calls) == 1
    for options in ({"damping": 0.1}, {"activation_order": True}):
        shared, alone = (
            gptq(weight_of(), used, SCHEMES["int4"], **options) for used in (statistics, statistics_of(inputs()))
        )
        assert torch.equal(shared.quantized.codes, alone.quantized.codes)
    assert len(calls) == 1 + 4


@pytest.mark.parametrize("n", [1, 2, 95, 96, 97, 200])
def test_inverse_factor(n):
    moment = damped(statistics_of(inputs(n=n)).second_moment, 0.0)
    factor, used = inverse_factor(moment, 0.01)
    assert (
        factor.dtype == torch.float64
        and torch.equal(factor, factor.triu())
        and (factor.diagonal() > 0).all()
        and used == 0.01
    )
    assert torch.allclose(factor.T @ factor @ damped(moment), torch.eye(n, dtype=torch.float64), atol=1e-8)
    upper = torch.linalg.cholesky(damped(moment), upper=True)
    assert torch.allclose(invert_upper(upper) @ upper, torch.eye(n, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("order", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "fp4", "nvfp4", "nf4"])
def test_dead_columns_are_zero_and_disturb_nothing(name, order):
    x, weight, dead = inputs(), weight_of(), [0, 17, 95]
    x[:, dead] = 0
    solved = gptq(weight, statistics_of(x), SCHEMES[name], activation_order=order)
    assert (solved.dequantized()[:, dead] == 0).all()
    zeroed = gptq(weight.index_fill(1, torch.tensor(dead), 0), statistics_of(x), SCHEMES[name], activation_order=order)
    assert torch.equal(solved.quantized.codes, zeroed.quantized.codes)
    assert gptq(weight, statistics_of(x), SCHEMES[name], damping=0.0).details == {"damping": [0.0]}, (
        "a zero on the diagonal asks for no damping"
    )
    living = [i for i in range(N) if i not in dead]
    if name != "nvfp4":  # whose groups would shift
        moment = statistics_of(x).second_moment
        alone = gptq(weight[:, living], with_moment(moment[living][:, living]), SCHEMES[name], activation_order=order)
        zeroed_parameters = find_parameters(weight.index_fill(1, torch.tensor(dead), 0), SCHEMES[name])
        assert torch.equal(solved.quantized.scale, zeroed_parameters.scale)
        assert int((solved.quantized.codes[:, living] != alone.quantized.codes).any(-1).sum()) <= 1


def test_a_site_that_never_saw_anything_is_zero():
    solved = gptq(weight_of(), with_moment(torch.zeros(N, N)), SCHEMES["int4"])
    assert (solved.dequantized() == 0).all()


# -- damping ---------------------------------------------------------------------------------------


def test_a_rank_deficient_moment_is_damped_as_asked():
    weight, statistics = weight_of(), statistics_of(inputs(tokens=10))
    solved = gptq(weight, statistics, SCHEMES["int4"])
    assert solved.details == {"damping": [0.01]} and torch.isfinite(solved.dequantized()).all()
    nearest = rtn(weight, None, SCHEMES["int4"])
    assert energy(solved.dequantized() - weight, statistics.second_moment) < 0.5 * energy(
        nearest.dequantized() - weight, statistics.second_moment
    )


@pytest.mark.parametrize("damping", [0.0, 1e-18])
def test_damping_is_raised_until_there_is_a_factor_and_recorded(damping):
    """Duplicated channels, and eigenvalues below zero by 3e-5 of the mean, where any rounding
    leaves no Cholesky factor; the healthy layer of the batch keeps its damping."""
    x = inputs()
    x[:, 50:] = x[:, :46]
    moment = statistics_of(x).second_moment
    bad = with_moment(moment - 3e-5 * moment.diagonal().mean() * torch.eye(N))
    solved = gptq(
        torch.stack([weight_of()] * 2),
        stack([bad, with_moment(statistics_of(inputs()).second_moment)]),
        SCHEMES["int4"],
        damping=damping,
    )
    used, healthy = solved.details["damping"]
    assert healthy == damping and math.isclose(used, 1e-4) and torch.isfinite(solved.dequantized()).all()
    alone = gptq(weight_of(), bad, SCHEMES["int4"], damping=damping)
    assert (
        alone.details["damping"] == [used]
        and int((solved.quantized.codes[0] != alone.quantized.codes).any(-1).sum()) <= 1
    )
    asked = gptq(weight_of(), bad, SCHEMES["int4"], damping=used)
    assert torch.equal(asked.quantized.codes, alone.quantized.codes)


@pytest.mark.parametrize(
    "moment", [[[1.0, 100.0], [100.0, 1.0]], [[1.0, math.nan], [math.nan, 1.0]]], ids=["indefinite", "NaN"]
)
def test_no_damping_saves_it(moment):
    with pytest.raises(NumericalFailure, match="Cholesky"):
        gptq(torch.ones(3, 2), with_moment(moment), scheme("int4"))


def test_nan_in_the_weight_is_a_failure():
    weight = weight_of()
    weight[3, 4] = math.nan
    for method in (gptq, rtn, low_rank, gptq_low_rank):
        with pytest.raises(NumericalFailure, match="NaN"):
            method(weight, statistics_of(inputs()), SCHEMES["int4"])


# -- low rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (40, 40), (1, 30), (30, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 17])
def test_leading_directions_leave_the_tail_singular_values(shape, rank):
    """Eckart and Young: |E - U Uᵀ E|² is the sum of the squares of the singular values beyond the
    rank."""
    matrix = normal(*shape)
    rank = min(rank, *shape)
    vectors = leading_directions(matrix, rank)
    assert vectors.shape == (shape[0], rank)
    assert torch.allclose(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
    assert abs((matrix - vectors @ (vectors.T @ matrix)).square().sum() - tail) < 1e-9 * matrix.square().sum()


def factor_of(metric, statistics):
    """M of the metric |(E - L) M|."""
    return (
        torch.linalg.cholesky(statistics.second_moment) if metric == "qera_exact" else torch.eye(N, dtype=torch.float64)
    )


@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_term_is_the_best_of_its_rank(metric, rank):
    """The residual in the metric that is minimized is that of the truncated SVD of E M, to the
    accuracy of bfloat16."""
    error, statistics = normal(M, N, seed=7), statistics_of(inputs())
    left, right = (factor.to(torch.bfloat16) for factor in term(error, statistics, rank, metric)[:2])
    assert left.shape == (M, rank) and right.shape == (rank, N)
    found = error - left.double() @ right.double()
    metric_factor = factor_of(metric, statistics)
    wanted = torch.linalg.svdvals(error @ metric_factor)[rank:].square().sum().item()
    assert (
        wanted * (1 - 1e-9)
        <= (found @ metric_factor).square().sum().item()
        <= wanted + 2e-4 * (error @ metric_factor).square().sum().item()
    )


def test_each_metric_wins_where_it_is_measured():
    weight, statistics = weight_of(), statistics_of(inputs())
    for method in (low_rank, gptq_low_rank):
        plain, exact = (
            weight - method(weight, statistics, SCHEMES["int4"], rank=6, metric=metric).dequantized()
            for metric in ("plain", "qera_exact")
        )
        assert energy(exact, statistics.second_moment) < 0.9 * energy(plain, statistics.second_moment)
        assert plain.square().sum() < 0.99 * exact.square().sum()


@pytest.mark.parametrize("method, base", [(low_rank, rtn), (gptq_low_rank, gptq)], ids=["low_rank", "gptq_low_rank"])
@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
def test_the_error_falls_with_the_rank(method, base, metric):
    weight, statistics = weight_of(), statistics_of(inputs())
    metric_factor = factor_of(metric, statistics)
    left = [
        (
            (weight - method(weight, statistics, SCHEMES["int4"], rank=rank, metric=metric).dequantized()).double()
            @ metric_factor
        )
        .square()
        .sum()
        for rank in (0, 1, 2, 4, 8, 16, 24)
    ]
    bare = ((weight - base(weight, statistics, SCHEMES["int4"]).dequantized()).double() @ metric_factor).square().sum()
    assert left[0] == bare and all(more < less for less, more in pairwise(left))
    assert left[-1] < 1e-4 * left[0]


@pytest.mark.parametrize("method, base", [(low_rank, rtn), (gptq_low_rank, gptq)], ids=["low_rank", "gptq_low_rank"])
@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
@pytest.mark.parametrize("name", ["int4", "int4 asymmetric group-32", "nvfp4"])
def test_rank_zero_is_the_base(method, base, metric, name):
    weight, statistics = weight_of(), statistics_of(inputs())
    found, wanted = (
        method(weight, statistics, SCHEMES[name], rank=0, metric=metric),
        base(weight, statistics, SCHEMES[name]),
    )
    assert (
        found.low_rank is None
        and torch.equal(found.dequantized(), wanted.dequantized())
        and found.details == wanted.details
    )
    beside = method(weight, statistics, SCHEMES[name], rank=5, metric=metric)
    assert torch.equal(beside.quantized.codes, wanted.quantized.codes)


@pytest.mark.parametrize("method", [low_rank, gptq_low_rank])
@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
@pytest.mark.parametrize("rank", [M, 1000])
def test_full_rank_recovers_the_weight(method, metric, rank):
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = method(weight, statistics, SCHEMES["int4"], rank=rank, metric=metric)
    error = weight - solved.quantized.dequantize()
    assert solved.low_rank[0].shape == (M, M) and solved.low_rank[1].shape == (M, N)
    assert (weight - solved.dequantized()).norm() < 2**-7 * error.norm()


@pytest.mark.parametrize("method", [low_rank, gptq_low_rank])
def test_the_branch_computes_what_the_merged_weight_does(method):
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = method(weight, statistics, SCHEMES["int4"], rank=5)
    left, right = (factor.float() for factor in solved.low_rank)
    x = inputs(3).float()[:20]
    branch = x @ solved.quantized.dequantize().T + (x @ right.T) @ left.T
    merged = x @ solved.dequantized().T
    assert torch.linalg.matrix_rank((solved.dequantized() - solved.quantized.dequantize()).double(), rtol=1e-5) == 5
    assert torch.allclose(branch, merged, atol=1e-5 * merged.abs().max().item())


@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
@pytest.mark.parametrize("method", [low_rank, gptq_low_rank])
def test_low_rank_of_a_batch_is_one_by_one(method, metric):
    weights, statistics = [weight_of(seed) for seed in (0, 10)], [statistics_of(inputs(seed)) for seed in (0, 10)]
    together = method(torch.stack(weights), stack(statistics), SCHEMES["int4"], rank=4, metric=metric)
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        alone = method(weight, alone, SCHEMES["int4"], rank=4, metric=metric)
        assert torch.allclose(together.dequantized()[i], alone.dequantized(), atol=2e-2 * weight.abs().max().item())
        assert torch.equal(together.quantized.codes[i], alone.quantized.codes)


@pytest.mark.parametrize("stored", ["float64", "float32"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_the_exact_metric_takes_a_moment_of_few_tokens(tokens, stored):
    """Rank-deficient, and as a calibration file holds it not even positive semidefinite; with rank
    >= tokens nothing of the output error is left."""
    weight, x = weight_of(), inputs(tokens=tokens)
    x[0, 3] *= 1000
    moment = statistics_of(x).second_moment
    statistics = with_moment(moment if stored == "float64" else moment.float().double())
    nearest = rtn(weight, statistics, SCHEMES["int4"]).dequantized() - weight
    left = [
        energy(
            low_rank(weight, statistics, SCHEMES["int4"], rank=rank, metric="qera_exact").dequantized() - weight, moment
        )
        for rank in (1, M - 1)
    ]
    assert left[1] < left[0] < energy(nearest, moment)
    if tokens == 3:
        assert left[1] < 1e-3 * energy(nearest, moment)


def test_a_moment_without_a_factor_fails_the_cell():
    with pytest.raises(NumericalFailure, match="Cholesky"):
        term(normal(3, 2), with_moment([[1.0, 100.0], [100.0, 1.0]]), 1, "qera_exact")
