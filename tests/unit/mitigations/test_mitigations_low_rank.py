"""Low-rank terms in every metric and storage, fitted before, after and in turns with the codes."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from itertools import pairwise
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
    normal,
    roundtrip,
    weight_of,
    with_moment,
)
from quantgrid.calibration.statistics import stack
from quantgrid.ground.errors import NumericalFailure
from quantgrid.inference.linear import QuantizedLinear, SiteInput
from quantgrid.mitigations.methods.caldera import caldera
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.methods.low_rank import low_rank, rank_of, term
from quantgrid.mitigations.methods.low_rank_first import low_rank_first
from quantgrid.mitigations.methods.mr_gptq import mr_gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.singular_domain import singular_domain
from quantgrid.mitigations.methods.sparse_outliers import sparse_outliers
from quantgrid.mitigations.solvers import singular
from quantgrid.mitigations.solvers.alternation import pick
from quantgrid.mitigations.solvers.singular import krylov_directions, leading_directions
from quantgrid.quantization.compensation_storage import (
    side_bits,
)
from quantgrid.quantization.layer_errors import accounted_bits, measure
from reference_statistics import statistics_of

# -- metrics and ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_residual_is_the_tail_of_the_singular_values(metric, rank):
    """Eckart and Young in the metric that is minimized, which the term (E M)_r M⁻¹ of the
    publications reaches too."""
    x, error = inputs(), normal(M, N, seed=7)
    factor = metric_factor(metric, x)
    left, right, _ = term(error, statistics_of(x), rank, metric)
    u, s, v = torch.linalg.svd(error @ factor, full_matrices=False)
    assert math.isclose(((error - left @ right) @ factor).square().sum(), s[rank:].square().sum(), rel_tol=1e-6)
    published = u[:, :rank] @ torch.diag(s[:rank]) @ torch.linalg.solve(factor.T, v[:rank].T).T
    assert torch.allclose(left @ right, published, atol=1e-6 * error.abs().max())


@pytest.mark.parametrize(
    "method",
    [low_rank, gptq_low_rank, partial(low_rank_first, iterations=3)],
    ids=["low_rank", "gptq_low_rank", "first"],
)
def test_no_metric_beats_the_exact_one_in_the_output_error(method):
    for seed in (0, 10):
        weight, statistics = weight_of(seed), statistics_of(inputs(seed))
        left = {
            metric: energy(
                method(weight, statistics, INT4, rank=5, metric=metric).dequantized() - weight, statistics.second_moment
            )
            for metric in METRICS
        }
        if method in (low_rank, gptq_low_rank):
            assert left["qera_exact"] <= min(left.values()) * 1.0001
        assert left["qera_exact"] < 0.9 * left["plain"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_error_falls_with_the_rank_in_its_metric(metric):
    x, weight = inputs(), weight_of()
    factor, statistics = metric_factor(metric, x), statistics_of(x)
    left = [
        ((weight - low_rank(weight, statistics, INT4, rank=rank, metric=metric).dequantized()).double() @ factor)
        .square()
        .sum()
        for rank in (0, 1, 3, 8, 16, 24)
    ]
    assert all(more < less for less, more in pairwise(left))


def test_a_share_is_of_the_smaller_dimension():
    assert [rank_of(rank, (3, 24, 96)) for rank in (0, 8, 24, 99, 0.5, 0.25, 0.001, 0.999)] == [
        0,
        8,
        24,
        24,
        12,
        6,
        1,
        24,
    ]
    weight, statistics = weight_of(), statistics_of(inputs())
    share, number = (low_rank(weight, statistics, INT4, rank=rank) for rank in (0.25, 6))
    assert torch.equal(share.dequantized(), number.dequantized())


# -- random singular vectors -----------------------------------------------------------------------


SPECTRA = {
    "flat": torch.ones(160),
    "noise": None,
    "decaying": 0.9 ** torch.arange(160),
    "slow": 1 / (1 + torch.arange(160)) ** 0.3,
    "low rank": (torch.arange(160) < 5).float(),
}


@pytest.mark.parametrize("shape", [(160, 300), (300, 160)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_random_singular_vectors_are_as_good_as_exact_ones(name, shape):
    noise, spectrum = normal(*shape, seed=3), SPECTRA[name]
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    matrix = noise if spectrum is None else u @ torch.diag(spectrum.double()) @ v
    vectors, blocks = krylov_directions(matrix, 6)
    wanted = torch.linalg.svdvals(matrix)
    assert vectors is not None and 1 <= blocks <= singular.LARGEST_BLOCKS
    assert torch.allclose(vectors.T @ vectors, torch.eye(6, dtype=torch.float64), atol=1e-8)
    kept = torch.linalg.svdvals(vectors.T @ matrix)
    assert abs(kept[-1] - wanted[5]) <= singular.ACCURACY * wanted[0]
    residual, least = (matrix - vectors @ (vectors.T @ matrix)).square().sum(), wanted[6:].square().sum()
    assert residual <= least + 2 * singular.ACCURACY * matrix.square().sum()
    again, _ = krylov_directions(matrix, 6)
    assert torch.equal(vectors, again)


@pytest.mark.parametrize(
    "method", [low_rank, gptq_low_rank, low_rank_first, caldera], ids=lambda method: method.__name__
)
def test_the_ridge_of_the_exact_metric_is_recorded_per_layer_and_raised_where_needed(method):
    """The second layer's moment has eigenvalues below zero by 3e-5 of the mean, as one of few
    tokens may have after rounding."""
    moment = statistics_of(inputs()).second_moment
    lowest = torch.linalg.eigvalsh(moment)[0]
    bad = moment - (lowest + 3e-5 * moment.diagonal().mean()) * torch.eye(len(moment))
    metric = {} if method is caldera else {"metric": "qera_exact"}
    solved = method(
        torch.stack([weight_of()] * 2), stack([with_moment(moment), with_moment(bad)]), INT4, rank=2, **metric
    )
    healthy, raised = solved.details["ridge"]
    assert healthy == 1e-10 and 1e-5 < raised < 1e-3


def test_beyond_a_size_the_random_way_is_taken_and_recorded(monkeypatch):
    monkeypatch.setattr(singular, "EXACT_UP_TO", 64)
    weight, statistics = weight_of(m=80), statistics_of(inputs())
    solved = low_rank(weight, statistics, INT4, rank=2, metric="qera_exact")
    assert solved.details["svd"][0].startswith("randomized, ")
    exact = leading_directions((weight - rtn(weight, None, INT4).dequantized()).double(), 40)
    assert exact.shape == (80, 40)  # half of all: no small space to speak of
    monkeypatch.setattr(singular, "EXACT_UP_TO", 4096)
    wanted = low_rank(weight, statistics, INT4, rank=2, metric="qera_exact")
    assert wanted.details == {"ridge": [1e-10]}
    found, least = (energy(done.dequantized() - weight, statistics.second_moment) for done in (solved, wanted))
    assert abs(found - least) < 2e-3 * least


def test_what_the_random_way_does_not_settle_is_solved_exactly_and_said(monkeypatch):
    monkeypatch.setattr(singular, "EXACT_UP_TO", 64)
    monkeypatch.setattr(singular, "LARGEST_BLOCKS", 1)
    matrix, record = normal(80, 96), {}
    vectors = leading_directions(matrix, 2, record)
    assert record == {"svd": "exact: 1 random blocks did not settle it"}
    tail = torch.linalg.svdvals(matrix)[2:].square().sum()
    assert math.isclose((matrix - vectors @ (vectors.T @ matrix)).square().sum(), tail, rel_tol=1e-9)


# -- stored factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
def test_coarser_factors_cost_more_and_still_help(metric):
    x, weight = inputs(), weight_of()
    factor, statistics = metric_factor(metric, x), statistics_of(x)
    left = {
        name: (
            (weight - low_rank(weight, statistics, INT4, rank=8, metric=metric, factors=name).dequantized()).double()
            @ factor
        )
        .square()
        .sum()
        .item()
        for name in ("bf16", "int8", "fp8", "int4")
    }
    bare = ((weight - rtn(weight, None, INT4).dequantized()).double() @ factor).square().sum().item()
    assert left["bf16"] < left["int8"] * 1.001 < left["fp8"] * 1.01 < left["int4"] < bare
    assert left["int8"] < 1.02 * left["bf16"]


@pytest.mark.parametrize("factors", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize(
    "method",
    [low_rank, gptq_low_rank, partial(caldera, iterations=2), partial(low_rank_first, iterations=2)],
    ids=["low_rank", "gptq_low_rank", "caldera", "first"],
)
def test_factors_come_back_from_disk_and_weigh_what_is_accounted(method, factors):
    weights, statistics = (
        torch.stack([weight_of(0), weight_of(10)]),
        stack([statistics_of(inputs(0)), statistics_of(inputs(10))]),
    )
    solved = method(weights, statistics, INT4, rank=6, factors=factors)
    for layer in range(2):
        weight, (left, right), bits = roundtrip(solved, layer)
        assert torch.equal(weight, solved.weight()[layer])
        assert torch.equal(left, solved.low_rank[0][layer].float()) and torch.equal(
            right, solved.low_rank[1][layer].float()
        )
        assert math.isclose(bits, side_bits(solved) * M * N, rel_tol=1e-9)
    width = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}[factors]
    expected = (width * 6 * (M + N) + (0 if factors == "bf16" else 2 * 6 * 32)) / (M * N)
    assert math.isclose(
        accounted_bits(solved, INT4)["stored_bits"], INT4.bits_per_element((M, N)) + expected, rel_tol=1e-9
    )


def test_the_branch_is_fed_with_what_is_asked_for():
    weight, statistics, x = weight_of(), statistics_of(inputs()), inputs(3).float()[:8]
    solved = low_rank(weight, statistics, INT4, rank=4)
    left, right = (factor.float() for factor in solved.low_rank)
    for branch_input, fed in (("quantized", x.round()), ("unquantized", x)):
        site_input = SiteInput([], torch.round, 1)
        found = QuantizedLinear(solved.weight(), None, site_input, (left, right), branch_input)(x)
        assert torch.allclose(found, x.round() @ solved.weight().T + fed @ right.T @ left.T, rtol=1e-4, atol=1e-4)
        assert low_rank(weight, statistics, INT4, rank=4, branch_input=branch_input).branch_input == branch_input


def test_the_joint_error_knows_what_the_branch_is_fed_with():
    weight, x = weight_of(), inputs().float()
    statistics = stack([statistics_of(x, x)])
    site = SimpleNamespace(statistics=statistics, rounded=x.round()[None])
    for branch_input, fed in (("quantized", x.round()), ("unquantized", x)):
        solved = low_rank(weight[None], statistics, INT4, rank=4, branch_input=branch_input)
        left, right = (factor[0].float() for factor in solved.low_rank)
        y, wanted = x.round() @ solved.weight()[0].T + fed @ right.T @ left.T, x @ weight.T
        found = measure(weight[None], solved, site)["joint_output_error"][0]
        assert math.isclose(
            found, ((y - wanted).double().square().sum() / wanted.double().square().sum()).item(), rel_tol=1e-3
        )


# -- terms and codes in turns ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "int4 group-16", "nvfp4"])
def test_caldera_is_never_worse_than_its_first_turn(name):
    for seed in (0, 10):
        weight, statistics = weight_of(seed), statistics_of(inputs(seed))
        first = gptq_low_rank(weight, statistics, SCHEMES[name], rank=4, metric="qera_exact")
        turns = [caldera(weight, statistics, SCHEMES[name], rank=4, iterations=count) for count in (1, 2, 6)]
        assert torch.equal(turns[0].dequantized(), first.dequantized()) and turns[0].details["turn"] == [1]
        left = [energy(solved.dequantized() - weight, statistics.second_moment) for solved in turns]
        assert all(more <= less * (1 + 1e-9) for less, more in pairwise(left)) and left[-1] < 0.95 * left[0]
        assert turns[-1].details["turns"] == [6]


@pytest.mark.parametrize("base", ["rtn", "gptq", "mr_gptq"])
def test_low_rank_first_rounds_what_its_term_leaves(base):
    weight, statistics = weight_of(), statistics_of(inputs())
    solve = {"rtn": rtn, "gptq": gptq, "mr_gptq": mr_gptq}[base]
    once = low_rank_first(weight, statistics, INT4, rank=4, base=base, iterations=1)
    u, s, v = torch.linalg.svd(weight.double())
    leading = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    left, right = (factor.double() for factor in once.low_rank)
    assert (left @ right - leading).norm() < 2**-6 * leading.norm()
    rest = weight - once.low_rank[0].float() @ once.low_rank[1].float()
    assert torch.equal(once.quantized.codes, solve(rest, statistics, INT4).quantized.codes)
    errors = [
        energy(
            low_rank_first(weight, statistics, INT4, rank=4, base=base, iterations=count).dequantized() - weight,
            statistics.second_moment,
        )
        for count in (1, 2, 20)
    ]
    assert all(more <= less * (1 + 1e-9) for less, more in pairwise(errors))


def test_low_rank_first_stops_early():
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = low_rank_first(weight, statistics, INT4, rank=4)
    assert solved.details["turns"][0] < 100 and solved.details["turn"][0] in (
        solved.details["turns"][0] - 1,
        solved.details["turns"][0],
    )


@pytest.mark.parametrize(
    "method", [partial(caldera, iterations=3), partial(low_rank_first, base="gptq")], ids=["caldera", "first"]
)
def test_turns_of_a_batch_are_one_by_one(method):
    weights, statistics = (
        [weight_of(seed) for seed in (0, 10, 20)],
        [statistics_of(inputs(seed)) for seed in (0, 10, 20)],
    )
    together = method(torch.stack(weights), stack(statistics), SCHEMES["nvfp4"], rank=4)
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        alone = method(weight, alone, SCHEMES["nvfp4"], rank=4)
        found, wanted = (
            energy(used - weight, statistics[i].second_moment)
            for used in (together.dequantized()[i], alone.dequantized())
        )
        assert abs(found - wanted) < 0.1 * wanted
        assert together.details["turn"][i] >= 1 and len(together.details["damping"]) == 3


@pytest.mark.parametrize("method, base", [(caldera, gptq), (low_rank_first, rtn), (sparse_outliers, rtn)])
def test_rank_zero_is_the_base_alone(method, base):
    weight, statistics = weight_of(), statistics_of(inputs())
    found, wanted = method(weight, statistics, INT4, rank=0), base(weight, statistics, INT4)
    assert found.low_rank is None and found.outliers is None and torch.equal(found.dequantized(), wanted.dequantized())


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric group-32", "nvfp4", "mxfp4", "kmeans", "unsigned"])
def test_layers_are_picked_whole(name):
    """Every tensor of every format, the byte-sized ones among them, comes from the layer that was
    asked for."""
    one, other = (
        low_rank(
            torch.stack([weight_of(seed), weight_of(seed + 1)]),
            stack([statistics_of(inputs())] * 2),
            SCHEMES[name],
            rank=2,
            factors="fp8",
        )
        for seed in (0, 40)
    )
    chosen = pick(torch.tensor([True, False]), one, other)
    for layer, source in enumerate((one, other)):
        assert torch.equal(chosen.dequantized()[layer], source.dequantized()[layer])
        for field in fields(one.quantized):
            part, wanted = getattr(chosen.quantized, field.name), getattr(source.quantized, field.name)
            if isinstance(part, torch.Tensor):
                assert torch.equal(*(tensor[layer].contiguous().view(torch.uint8) for tensor in (part, wanted)))


def test_nan_in_the_weight_is_a_failure_of_every_method():
    weight = weight_of()
    weight[3, 4] = math.nan
    for method in (caldera, low_rank_first, sparse_outliers, singular_domain, mr_gptq):
        with pytest.raises(NumericalFailure):
            method(weight, statistics_of(inputs()), INT4)
