"""Low-rank terms in every metric and storage, fitted before, after and in turns with the codes; outliers and the singular domain."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mitigation_cases import SCHEMES, M, N, energy, inputs, normal, weight_of, with_moment
from quantgrid.compensation_storage import read_low_rank, side_bits, side_entry, side_tensors, with_outliers
from quantgrid.errors import NumericalFailure
from quantgrid.layer_errors import accounted_bits, measure
from quantgrid.linear import QuantizedLinear, SiteInput
from quantgrid.mitigations import singular
from quantgrid.mitigations.alternation import pick
from quantgrid.mitigations.caldera import caldera
from quantgrid.mitigations.gptq import gptq
from quantgrid.mitigations.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.low_rank import low_rank, rank_of, term
from quantgrid.mitigations.low_rank_first import low_rank_first
from quantgrid.mitigations.mr_gptq import mr_gptq
from quantgrid.mitigations.rtn import rtn
from quantgrid.mitigations.singular import krylov_directions, leading_directions
from quantgrid.mitigations.singular_domain import singular_domain
from quantgrid.mitigations.sparse_outliers import affordable, sparse_outliers
from quantgrid.statistics import stack
from reference_statistics import statistics_of

INT4 = SCHEMES["int4"]
METRICS = ["plain", "lqer", "qera_approx", "qera_exact"]


def metric_factor(metric, x):
    """M of the metric |(E - L) M|, from the tokens ``x``."""
    if metric == "qera_exact":
        values, vectors = np.linalg.eigh((x.T @ x / len(x)).numpy())  # the symmetric root, where the library takes a Cholesky factor
        return torch.from_numpy(vectors @ np.diag(np.sqrt(values.clip(min=0))) @ vectors.T)
    return torch.diag({"plain": torch.ones(N, dtype=torch.float64), "lqer": x.abs().mean(0), "qera_approx": x.square().mean(0).sqrt()}[metric])


# -- metrics and ranks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_residual_is_the_tail_of_the_singular_values(metric, rank):
    """Eckart and Young in the metric that is minimized, which the term (E M)_r M⁻¹ of the publications reaches too."""
    x, error = inputs(), normal(M, N, seed=7)
    factor = metric_factor(metric, x)
    left, right, _ = term(error, statistics_of(x), rank, metric)
    u, s, v = torch.linalg.svd(error @ factor, full_matrices=False)
    assert math.isclose(((error - left @ right) @ factor).square().sum(), s[rank:].square().sum(), rel_tol=1e-6)
    published = u[:, :rank] @ torch.diag(s[:rank]) @ torch.linalg.solve(factor.T, v[:rank].T).T
    assert torch.allclose(left @ right, published, atol=1e-6 * error.abs().max())


@pytest.mark.parametrize("method", [low_rank, gptq_low_rank, partial(low_rank_first, iterations=3)], ids=["low_rank", "gptq_low_rank", "first"])
def test_no_metric_beats_the_exact_one_in_the_output_error(method):
    for seed in (0, 10):
        weight, statistics = weight_of(seed), statistics_of(inputs(seed))
        left = {metric: energy(method(weight, statistics, INT4, rank=5, metric=metric).dequantized() - weight, statistics.second_moment)
                for metric in METRICS}
        if method in (low_rank, gptq_low_rank):
            assert left["qera_exact"] <= min(left.values()) * 1.0001
        assert left["qera_exact"] < 0.9 * left["plain"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_error_falls_with_the_rank_in_its_metric(metric):
    x, weight = inputs(), weight_of()
    factor, statistics = metric_factor(metric, x), statistics_of(x)
    left = [((weight - low_rank(weight, statistics, INT4, rank=rank, metric=metric).dequantized()).double() @ factor).square().sum()
            for rank in (0, 1, 3, 8, 16, 24)]
    assert all(more < less for less, more in pairwise(left))


def test_a_share_is_of_the_smaller_dimension():
    assert [rank_of(rank, (3, 24, 96)) for rank in (0, 8, 24, 99, 0.5, 0.25, 0.001, 0.999)] == [0, 8, 24, 24, 12, 6, 1, 24]
    weight, statistics = weight_of(), statistics_of(inputs())
    share, number = (low_rank(weight, statistics, INT4, rank=rank) for rank in (0.25, 6))
    assert torch.equal(share.dequantized(), number.dequantized())


# -- random singular vectors -----------------------------------------------------------------------------------------------------------------


SPECTRA = {"flat": torch.ones(160), "noise": None, "decaying": 0.9 ** torch.arange(160), "slow": 1 / (1 + torch.arange(160)) ** 0.3,
           "low rank": (torch.arange(160) < 5).float()}


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


@pytest.mark.parametrize("method", [low_rank, gptq_low_rank, low_rank_first, caldera], ids=lambda method: method.__name__)
def test_the_ridge_of_the_exact_metric_is_recorded_per_layer_and_raised_where_needed(method):
    """The second layer's moment has eigenvalues below zero by 3e-5 of the mean, as one of few tokens may have after rounding."""
    moment = statistics_of(inputs()).second_moment
    lowest = torch.linalg.eigvalsh(moment)[0]
    bad = moment - (lowest + 3e-5 * moment.diagonal().mean()) * torch.eye(len(moment))
    metric = {} if method is caldera else {"metric": "qera_exact"}
    solved = method(torch.stack([weight_of()] * 2), stack([with_moment(moment), with_moment(bad)]), INT4, rank=2, **metric)
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


# -- stored factors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["plain", "qera_exact"])
def test_coarser_factors_cost_more_and_still_help(metric):
    x, weight = inputs(), weight_of()
    factor, statistics = metric_factor(metric, x), statistics_of(x)
    left = {name: ((weight - low_rank(weight, statistics, INT4, rank=8, metric=metric, factors=name).dequantized()).double() @ factor)
            .square().sum().item() for name in ("bf16", "int8", "fp8", "int4")}
    bare = ((weight - rtn(weight, None, INT4).dequantized()).double() @ factor).square().sum().item()
    assert left["bf16"] < left["int8"] * 1.001 < left["fp8"] * 1.01 < left["int4"] < bare
    assert left["int8"] < 1.02 * left["bf16"]


def roundtrip(solved, layer=0):
    """(weight without the term, term) as a checkpoint gives them back, and the bits on disk of what is beside the codes."""
    tensors = {f"a.{name}": tensor for name, tensor in side_tensors(solved, layer).items()}
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    entry = {"shape": list(solved.quantized.codes.shape[-2:]), **side_entry(solved)}
    weight = with_outliers("a", entry, tensors, solved.quantized.dequantize()[layer].clone())
    term_of = read_low_rank("a", entry, tensors, torch.float32)
    assert not tensors
    return weight, term_of, bits


@pytest.mark.parametrize("factors", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("method", [low_rank, gptq_low_rank, partial(caldera, iterations=2), partial(low_rank_first, iterations=2)],
                         ids=["low_rank", "gptq_low_rank", "caldera", "first"])
def test_factors_come_back_from_disk_and_weigh_what_is_accounted(method, factors):
    weights, statistics = torch.stack([weight_of(0), weight_of(10)]), stack([statistics_of(inputs(0)), statistics_of(inputs(10))])
    solved = method(weights, statistics, INT4, rank=6, factors=factors)
    for layer in range(2):
        weight, (left, right), bits = roundtrip(solved, layer)
        assert torch.equal(weight, solved.weight()[layer])
        assert torch.equal(left, solved.low_rank[0][layer].float()) and torch.equal(right, solved.low_rank[1][layer].float())
        assert math.isclose(bits, side_bits(solved) * M * N, rel_tol=1e-9)
    width = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}[factors]
    expected = (width * 6 * (M + N) + (0 if factors == "bf16" else 2 * 6 * 32)) / (M * N)
    assert math.isclose(accounted_bits(solved, INT4)["stored_bits"], INT4.bits_per_element((M, N)) + expected, rel_tol=1e-9)


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
        assert math.isclose(found, ((y - wanted).double().square().sum() / wanted.double().square().sum()).item(), rel_tol=1e-3)


# -- terms and codes in turns ------------------------------------------------------------------------------------------------------------------


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
    errors = [energy(low_rank_first(weight, statistics, INT4, rank=4, base=base, iterations=count).dequantized() - weight, statistics.second_moment)
              for count in (1, 2, 20)]
    assert all(more <= less * (1 + 1e-9) for less, more in pairwise(errors))


def test_low_rank_first_stops_early():
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = low_rank_first(weight, statistics, INT4, rank=4)
    assert solved.details["turns"][0] < 100 and solved.details["turn"][0] in (solved.details["turns"][0] - 1, solved.details["turns"][0])


@pytest.mark.parametrize("method", [partial(caldera, iterations=3), partial(low_rank_first, base="gptq")], ids=["caldera", "first"])
def test_turns_of_a_batch_are_one_by_one(method):
    weights, statistics = [weight_of(seed) for seed in (0, 10, 20)], [statistics_of(inputs(seed)) for seed in (0, 10, 20)]
    together = method(torch.stack(weights), stack(statistics), SCHEMES["nvfp4"], rank=4)
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        alone = method(weight, alone, SCHEMES["nvfp4"], rank=4)
        found, wanted = (energy(used - weight, statistics[i].second_moment) for used in (together.dequantized()[i], alone.dequantized()))
        assert abs(found - wanted) < 0.1 * wanted
        assert together.details["turn"][i] >= 1 and len(together.details["damping"]) == 3


@pytest.mark.parametrize("method, base", [(caldera, gptq), (low_rank_first, rtn), (sparse_outliers, rtn)])
def test_rank_zero_is_the_base_alone(method, base):
    weight, statistics = weight_of(), statistics_of(inputs())
    found, wanted = method(weight, statistics, INT4, rank=0), base(weight, statistics, INT4)
    assert found.low_rank is None and found.outliers is None and torch.equal(found.dequantized(), wanted.dequantized())


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric group-32", "nvfp4", "mxfp4", "kmeans", "unsigned"])
def test_layers_are_picked_whole(name):
    """Every tensor of every format, the byte-sized ones among them, comes from the layer that was asked for."""
    one, other = (low_rank(torch.stack([weight_of(seed), weight_of(seed + 1)]), stack([statistics_of(inputs())] * 2), SCHEMES[name], rank=2,
                           factors="fp8") for seed in (0, 40))
    chosen = pick(torch.tensor([True, False]), one, other)
    for layer, source in enumerate((one, other)):
        assert torch.equal(chosen.dequantized()[layer], source.dequantized()[layer])
        for field in fields(one.quantized):
            part, wanted = getattr(chosen.quantized, field.name), getattr(source.quantized, field.name)
            if isinstance(part, torch.Tensor):
                assert torch.equal(*(tensor[layer].contiguous().view(torch.uint8) for tensor in (part, wanted)))


# -- outliers --------------------------------------------------------------------------------------------------------------------------------


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
    assert torch.equal(used[kept], weight.flatten()[kept].bfloat16().float()) and torch.equal(used[~kept], bare.dequantized().flatten()[~kept])


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (576, 1536), (1, 64)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 8, 24])
def test_outliers_take_the_bytes_of_a_rank_and_no_more(shape, rank):
    count, budget = affordable(rank, shape), 16 * rank * sum(shape)
    assert 32 * count + (16 * shape[0] if rank else 0) <= budget or count == 0
    assert count == shape[0] * shape[1] or 32 * (count + 1) + 16 * shape[0] > budget


def test_outliers_come_back_from_disk_and_weigh_what_is_accounted():
    weights, statistics = torch.stack([weight_of(0), weight_of(10)]), stack([statistics_of(inputs(0)), statistics_of(inputs(10))])
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
    """Statistics of one layer of 40,000 channels. Only the diagonal of the second moment is read, so it is one number, expanded."""
    one = torch.ones(1, 40000, dtype=torch.float64)
    return SimpleNamespace(count=1, mean=one, second_moment=torch.ones(1, dtype=torch.float64).expand(1, 40000, 40000), mean_absolute=one,
                           minimum=-one, maximum=one, samples=one[None], estimated=False)


# -- singular domain ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "int4 group-16", "nvfp4"])
def test_the_singular_domain_lowers_the_output_error(name):
    weight, statistics = weight_of(), statistics_of(inputs())
    nearest = energy(rtn(weight, None, SCHEMES[name]).dequantized() - weight, statistics.second_moment)
    zero, some, many = (singular_domain(weight, statistics, SCHEMES[name], steps=steps) for steps in (0, 10, 60))
    assert torch.equal(zero.dequantized(), rtn(weight, None, SCHEMES[name]).dequantized())
    assert zero.details == {"step": [0], "error_to_rounding": [1.0]}
    left = [energy(solved.dequantized() - weight, statistics.second_moment) for solved in (zero, some, many)]
    assert left[0] >= left[1] >= left[2] and left[2] < 0.8 * nearest
    assert math.isclose(many.details["error_to_rounding"][0], left[2] / nearest, rel_tol=1e-3) and 0 < many.details["step"][0] <= 60
    assert accounted_bits(many, SCHEMES[name]) == accounted_bits(zero, SCHEMES[name])


def test_a_wider_band_is_more_general():
    """Of one step each, the gradient of a wider band contains that of a narrow one; a batch is its members one by one."""
    weights, statistics = [weight_of(seed) for seed in (0, 10)], [statistics_of(inputs(seed)) for seed in (0, 10)]
    left = [energy(singular_domain(weights[0], statistics[0], INT4, steps=60, bandwidth=width).dequantized() - weights[0],
                   statistics[0].second_moment) for width in (0, 2)]
    assert left[1] < left[0]
    together = singular_domain(torch.stack(weights), stack(statistics), INT4, steps=5)
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        assert torch.equal(together.dequantized()[i], singular_domain(weight, alone, INT4, steps=5).dequantized())


def test_the_first_step_goes_along_the_gradient():
    """Straight through the rounding: the loss of W' itself, differentiated by autograd, has the slope that Adam's first step follows."""
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
        assert energy(wanted.dequantized() - weight, statistics.second_moment) >= energy(rounded - weight, statistics.second_moment)


def test_nan_in_the_weight_is_a_failure_of_every_method():
    weight = weight_of()
    weight[3, 4] = math.nan
    for method in (caldera, low_rank_first, sparse_outliers, singular_domain, mr_gptq):
        with pytest.raises(NumericalFailure):
            method(weight, statistics_of(inputs()), INT4)
