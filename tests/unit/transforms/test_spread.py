"""Tests of the order of PeRQ: permutations that even out the mass of blocks, and the function of the model."""

from __future__ import annotations

import pytest
import torch

from quantgrid.transforms.primitives.reorder import equal_mass, zigzag
from quantgrid.transforms.recipes import perq
from reference_statistics import run
from tiny_decoders import CASES
from transform_cases import folded

LLAMA = next(case for case in CASES if case.bias and case.tied)


def masses(values: torch.Tensor, order: torch.Tensor, size: int) -> torch.Tensor:
    return values[order].view(-1, size).sum(-1)


@pytest.mark.parametrize(("count", "size"), [(64, 16), (1536, 32), (144, 16)])
@pytest.mark.parametrize("rule", [equal_mass, zigzag])
def test_blocks_get_similar_masses(rule, count, size):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).exp().sort().values
    order = rule(values, size)
    assert order.sort().values.tolist() == list(range(count))
    assert masses(values, order, size).max() < masses(values, torch.arange(count), size).max() / 1.5


def test_each_channel_goes_to_the_lightest_block_with_room():
    values = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0])
    assert equal_mass(values, 3).tolist() == [1, 4, 2, 3, 5, 0]
    assert masses(values, equal_mass(values, 3), 3).tolist() == [14.0, 16.0]


def test_a_full_block_takes_no_more():
    values = torch.tensor([10.0, 1.0, 1.0, 0.5])
    assert sorted(map(sorted, equal_mass(values, 2).view(2, 2).tolist())) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("values", [[3.0, 3.0, 0.0, 2.0, 2.0, 2.0], [1.0] * 6, [2.0, 1.0, 1.0, 2.0, 2.0, 0.0]])
def test_balanced_blocks_stay_as_they_are(values):
    """Dealing gives the first values sums of 7 and 5 instead of 6 and 6."""
    assert equal_mass(torch.tensor(values), 3).tolist() == [*range(6)]


@pytest.mark.parametrize(("blocks", "size"), [(2, 3), (3, 4), (8, 16)])
def test_no_block_is_heavier_than_the_heaviest_before(blocks, size):
    kept = 0
    for seed in range(200):
        values = torch.rand(blocks * size, generator=torch.Generator().manual_seed(seed)).mul(4).round().double()
        order = equal_mass(values, size)
        before, after = (masses(values, o, size).max() for o in (torch.arange(len(values)), order))
        assert order.sort().values.tolist() == list(range(len(values))) and after <= before
        kept += torch.equal(order, torch.arange(len(values)))
        assert after < before or torch.equal(order, torch.arange(len(values)))
    assert kept < 200


@pytest.mark.parametrize("order", ["none", "zigzag", "mass"])
def test_every_order_keeps_the_function(order, given):
    made = given(LLAMA)
    result = folded(made, made.fitted(perq.primitives(5, 16, order)), "exact")
    logits, _ = run(result.state, made.config, made.tokens[:2], result.online)
    assert torch.allclose(logits, made.logits, atol=1e-9)


def test_the_order_evens_out_the_inputs_of_the_down_projection(given):
    made = given(LLAMA)
    found = {}
    for order in ("none", "mass"):
        layer = folded(made, made.fitted(perq.primitives(5, 16, order)[:-1]), "exact").layers[0]
        found[order] = layer.statistics["down_input"].mean_absolute.view(-1, 16).sum(-1)
    assert found["mass"].max() < found["none"].max()
    assert torch.isclose(found["mass"].sum(), found["none"].sum())
