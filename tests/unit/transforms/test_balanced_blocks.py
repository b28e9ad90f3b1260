"""Tests of WUSH: the exact properties of its blocks, and the function of the model."""

from __future__ import annotations

import pytest
import torch

from quantgrid.ground.errors import NumericalFailure
from quantgrid.linalg.blocks import diagonal_blocks, stacked_columns, trace_products
from quantgrid.models.plans import SITES
from quantgrid.quantization.distributions import trace_excesses
from quantgrid.transforms.primitives.balanced_blocks import balancing_blocks
from quantgrid.transforms.recipes import wush
from tiny_decoders import CASES
from transform_cases import ALL, folded

LLAMA = next(case for case in CASES if case.bias and case.tied)
K = 16


def problem(seed: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """(second moment (32, 32), weights (rows, 32)), float64, with channels of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 32)
    mixed = x @ torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return mixed.mT @ mixed / 200, torch.randn(rows, 32, generator=generator, dtype=torch.float64)


def solved(
    moment: torch.Tensor, weights: list[torch.Tensor], hadamard: bool = True, damping: float = 0.0, size: int = K
):
    factors = stacked_columns(weights, size)
    return balancing_blocks(diagonal_blocks(moment, size), factors, hadamard, damping, "site 'a'")


def moments_after(moment: torch.Tensor, weight: torch.Tensor, blocks, inverse, number: int):
    """Second moments of inputs and of weights (per row) of one block after the transform."""
    at = slice(number * K, (number + 1) * K)
    inputs = blocks[number].mT @ moment[at, at] @ blocks[number]
    columns = weight[:, at] @ inverse[number]
    return inputs, columns.mT @ columns / len(weight)


@pytest.mark.parametrize("rows", [40, 17])
def test_inputs_and_weights_have_the_same_second_moment_with_a_constant_diagonal(rows):
    moment, weight = problem(0, rows)
    blocks, inverse = solved(moment, [weight[:9], weight[9:]])
    for number in range(2):
        inputs, columns = moments_after(moment, weight, blocks, inverse, number)
        assert torch.allclose(inputs, columns, rtol=1e-9, atol=1e-12)
        assert torch.allclose(inputs.diagonal(), inputs.diagonal().mean().expand(K), rtol=1e-9)
        assert torch.allclose(blocks[number] @ inverse[number].mT, torch.eye(K, dtype=torch.float64), atol=1e-10)


def test_the_eigenvalues_do_not_change_under_a_map_before_it():
    moment, weight = problem(1)
    generator = torch.Generator().manual_seed(0)
    before = torch.block_diag(*(torch.randn(K, K, generator=generator, dtype=torch.float64) for _ in range(2)))
    changed = before.mT @ moment @ before, weight @ torch.linalg.inv(before).mT
    for number in range(2):
        found = [
            torch.linalg.eigvalsh(moments_after(c, w, *solved(c, [w]), number)[0])
            for c, w in ((moment, weight), changed)
        ]
        assert torch.allclose(*found, rtol=1e-7)


def test_the_product_of_the_traces_is_the_smallest_of_all_transforms():
    moment, weight = problem(2)
    blocks, inverse = solved(moment, [weight])
    inputs, columns = moments_after(moment, weight, blocks, inverse, 0)
    least = inputs.trace() * columns.trace()
    assert torch.isclose(least, torch.linalg.eigvalsh(inputs).sum() ** 2)
    for seed in range(20):
        other = torch.randn(K, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = moments_after(moment, weight, other[None], torch.linalg.inv(other).mT[None], 0)
        assert found[0].trace() * found[1].trace() > least
    identity = torch.eye(K, dtype=torch.float64)[None]
    found = moments_after(moment, weight, identity, identity, 0)
    assert found[0].trace() * found[1].trace() > 2 * least


def test_the_product_of_the_traces_and_its_bound_are_those_of_the_definition():
    moment, weight = problem(6)
    products, bounds = trace_products(moment, [weight[:9], weight[9:]], K)
    for number in range(2):
        at = slice(number * K, (number + 1) * K)
        values, axes = torch.linalg.eigh(moment[at, at])
        root = axes @ values.sqrt().diag() @ axes.mT
        bound = torch.linalg.matrix_norm(weight[:, at] @ root / len(weight) ** 0.5, "nuc") ** 2
        assert torch.isclose(bounds[number], bound)
        wanted = moment[at, at].trace() * weight[:, at].square().sum() / len(weight)
        assert torch.isclose(products[number], wanted)


@pytest.mark.parametrize("size, reaches", [(16, [True, False]), (32, [True, True])])
def test_the_excess_of_the_traces_is_one_under_wush_of_the_same_block_size(size, reaches):
    """Blocks of 32 have equal second moments, so their halves have too, and reach the bound of halves."""
    moment, weight = problem(6)
    blocks, inverse = (torch.block_diag(*part) for part in solved(moment, [weight], size=size))
    reached, plain = trace_excesses(blocks.mT @ moment @ blocks, weight @ inverse), trace_excesses(moment, weight)
    for name in ("trace_excess", "largest_trace_excess"):
        values = [reached[f"{name}_{block}"] for block in (16, 32)]
        assert [value == pytest.approx(1, abs=1e-9) for value in values] == reaches and max(values) < 2
        assert min(plain[f"{name}_{block}"] for block in (16, 32)) > 1.9


def test_blocks_of_outliers_dominate_the_excess_of_the_traces_of_a_site():
    """One of eight blocks has an outlier; the median over the blocks would not show it."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4096, 256, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    before = trace_excesses(x.mT @ x / len(x), weight)
    x[:, 40] *= 100
    found = trace_excesses(x.mT @ x / len(x), weight)
    for size in (16, 32):
        products, bounds = trace_products(x.mT @ x / len(x), [weight], size)
        assert before[f"trace_excess_{size}"] < 2 and (products / bounds).median() < 2
        assert found[f"trace_excess_{size}"] == pytest.approx((products.sum() / bounds.sum()).item())
        assert found[f"trace_excess_{size}"] > 5
        assert found[f"largest_trace_excess_{size}"] == pytest.approx((products / bounds).max().item())
        assert found[f"largest_trace_excess_{size}"] > found[f"trace_excess_{size}"]


@pytest.mark.parametrize("channels, sizes", [(33, ()), (48, (16,)), (64, (16, 32))])
def test_a_block_size_that_does_not_divide_the_channels_has_no_excess(channels, sizes):
    generator = torch.Generator().manual_seed(8)
    x, weight = (torch.randn(rows, channels, generator=generator, dtype=torch.float64) for rows in (200, 40))
    found = trace_excesses(x.mT @ x, weight)
    assert {int(name.rpartition("_")[2]) for name, value in found.items() if value is not None} == {*sizes}
    assert len(found) == 4 and all(value is None or value > 1 for value in found.values())


def test_inputs_that_meet_no_weight_have_no_ratio_but_their_product_counts():
    moment, weight = problem(9)
    turn = torch.linalg.qr(problem(10)[0]).Q[:K, :K]
    turn = torch.linalg.qr(turn).Q
    # in the first block, inputs in eight directions, and weights in the other eight
    moment[:K], moment[:, :K], weight[:, :K] = 0, 0, weight[:, :K] @ turn[:, 8:] @ turn[:, 8:].mT
    moment[:K, :K] = turn[:, :8] @ turn[:, :8].mT
    products, bounds = trace_products(moment, [weight], K)
    assert products[0] > 0 and bounds[0] == 0 and bounds[1] > 0
    found = trace_excesses(moment, weight)
    assert found["trace_excess_16"] == pytest.approx((products.sum() / bounds[1]).item())
    assert found["largest_trace_excess_16"] == pytest.approx((products[1] / bounds[1]).item())
    alone = trace_excesses(moment[:K, :K], weight[:, :K])
    nothing = trace_excesses(torch.zeros(32, 32), weight)
    assert {*alone.values()} == {*nothing.values()} == {None}


def test_without_hadamard_both_moments_are_diagonal():
    moment, weight = problem(3)
    inputs, columns = moments_after(moment, weight, *solved(moment, [weight], hadamard=False), 0)
    assert torch.allclose(inputs, inputs.diagonal().diag(), atol=1e-10)
    assert torch.allclose(inputs, columns, atol=1e-10)


def test_a_singular_block_is_refused_without_damping_and_accepted_with_it():
    moment, weight = problem(4)
    moment[0], moment[:, 0] = 0, 0
    with pytest.raises(NumericalFailure, match="site 'a': a block of 16 channels .* without full rank"):
        solved(moment, [weight])
    blocks, inverse = solved(moment, [weight], damping=0.01)
    assert torch.allclose(blocks @ inverse.mT, torch.eye(K, dtype=torch.float64).expand(2, K, K), atol=1e-9)


def test_fewer_outputs_than_channels_of_a_block_need_damping():
    moment, weight = problem(5, 7)
    with pytest.raises(NumericalFailure, match="'damping' is 0; the default 0.01 accepts them"):
        solved(moment, [weight])
    blocks, inverse = solved(moment, [weight], damping=0.01)
    assert torch.allclose(blocks @ inverse.mT, torch.eye(K, dtype=torch.float64).expand(2, K, K), atol=1e-9)


def test_blocks_of_zeros_are_left_invertible():
    blocks, inverse = solved(torch.zeros(32, 32, dtype=torch.float64), [torch.zeros(8, 32)], damping=0.01)
    assert torch.allclose(blocks @ inverse.mT, torch.eye(K, dtype=torch.float64).expand(2, K, K), atol=1e-12)


def test_every_site_of_a_decoder_is_balanced(given):
    made = given(LLAMA)
    for layer in folded(made, made.fitted(wush.primitives(K, ALL, True, 1e-9)), "exact").layers:
        for site, linears in SITES.items():
            weight = torch.cat([layer.weights[linear] for linear in linears]).double()
            inputs = diagonal_blocks(layer.statistics[site].second_moment.double(), K)
            columns = weight.unflatten(-1, (-1, K)).transpose(0, 1)
            columns = columns.mT @ columns / len(weight)
            assert torch.allclose(inputs, columns, rtol=1e-3, atol=1e-3 * float(columns.abs().amax()))
