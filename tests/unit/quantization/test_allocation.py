"""The allocation of bits equals enumeration on small tables, never loses to a uniform scheme, and ties groups."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from quantgrid.ground.errors import NumericalFailure
from quantgrid.models.shapes import ModelShape
from quantgrid.quantization.allocation import Table, allocate, front
from quantgrid.quantization.linear_groups import fused_groups, is_tied, linear_groups

SCHEMES = ("int3", "int4", "int8")


def table(seed: int, groups: int = 3, schemes: int = 3, ordered: bool = True) -> Table:
    """Random predictions and bits; finer schemes cost more bits and, if ``ordered``, less divergence."""
    drawn = np.random.default_rng(seed)
    sizes = drawn.integers(1, 9, groups) * 64
    divergence = np.exp(drawn.normal(-8, 2, (groups, 1)) - np.arange(schemes) * drawn.uniform(0.5, 3))
    if not ordered:
        divergence = drawn.permuted(divergence, axis=1)
    bits = sizes[:, None] * np.linspace(3, 8, schemes) + 32 * np.arange(schemes)
    names = tuple(f"scheme-{number}" for number in range(schemes))
    return Table(names, [[f"{row}.q"] for row in range(groups)], divergence, bits.astype(np.int64), int(sizes.sum()))


def enumerated(found: Table, budget: float | None, divergence: float | None) -> list[tuple[float, tuple[int, ...]]]:
    """(objective, choice) of every choice within the limit, the best first."""
    choices = product(range(len(found.names)), repeat=len(found.groups))
    sums = [(*found.sums(choice), choice) for choice in choices]
    if budget is not None:
        return sorted((loss, choice) for loss, bits, choice in sums if bits + found.added <= budget * found.size)
    return sorted((float(bits), choice) for loss, bits, choice in sums if loss <= divergence)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("groups, schemes", [(3, 3), (5, 4)])
def test_the_best_choices_are_those_of_enumeration(seed, groups, schemes):
    found = table(seed, groups, schemes, ordered=seed % 3 > 0)
    for budget in (3.7, 4.6, 6.0):
        wanted = enumerated(found, budget, None)
        ours = [found.sums(choice)[0] for choice in allocate(found, budget, count=5, gap=0.0)]
        assert ours == pytest.approx([loss for loss, _ in wanted[:5]], rel=1e-6)
    limit = enumerated(found, 4.6, None)[0][0] * 1.5
    wanted = enumerated(found, None, limit)
    ours = [found.sums(choice)[1] for choice in allocate(found, None, limit, count=3, gap=0.0)]
    assert ours == [bits for bits, _ in wanted[:3]]


def test_alternatives_are_distinct_and_end_where_there_are_no_more():
    found = table(1, groups=2, schemes=2)
    everything = allocate(found, 8.5, count=20)
    assert len(everything) == len(set(everything)) == 4
    losses = [found.sums(choice)[0] for choice in everything]
    assert losses == sorted(losses)


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_of_a_uniform_scheme_is_met_and_never_worse(seed):
    found = table(seed, groups=24, schemes=6, ordered=seed % 2 == 0)
    for choice in found.uniform().values():
        uniform = found.described(choice)
        ours = found.described(allocate(found, uniform["bits"])[0])
        assert ours["bits"] <= uniform["bits"] and ours["predicted_kl"] <= uniform["predicted_kl"]


def test_bits_of_the_transform_count():
    plain = table(2, groups=6)
    added = Table(plain.names, plain.groups, plain.divergence, plain.bits, plain.size, added=plain.size // 4)
    for budget in (4.0, 5.0):
        described = added.described(allocate(added, budget)[0])
        assert described["bits"] <= budget
        assert described["schemes"] == plain.described(allocate(plain, budget - 0.25)[0])["schemes"]


def test_a_limit_below_every_choice_is_a_failure_with_the_smallest():
    found = table(3)
    smallest = found.described((0, 0, 0))
    with pytest.raises(NumericalFailure, match=f"the smallest has {smallest['bits']:.4g} stored bits per weight"):
        allocate(found, smallest["bits"] - 0.01)
    with pytest.raises(NumericalFailure, match="predicted divergence"):
        allocate(found, None, found.divergence.min(axis=1).sum() * 0.99)


def test_equal_choices_are_in_the_order_of_their_names():
    found = Table(("b", "a"), [["0.q"], ["0.o"]], np.full((2, 2), 0.5), np.full((2, 2), 64), 32)
    first = allocate(found, 4.0, count=4)
    assert [found.names[column] for column in first[0]] == ["a", "a"]
    assert first == allocate(found, 4.0, count=4)


def test_the_front_falls():
    points = front(table(4, groups=8), 7)
    assert [point["bits"] for point in points] == sorted(point["bits"] for point in points)
    losses = [point["predicted_kl"] for point in points]
    assert losses == sorted(losses, reverse=True) and len(points) == 7


def test_a_table_adds_linears_of_a_group_and_weighs_their_errors():
    errors = {
        "added_bits": 0.0,
        "linears": {
            name: {
                "size": 64,
                "schemes": {
                    "fine": {"output_error": error / 10, "stored_bits": 8.0},
                    "rough": {"output_error": error, "stored_bits": 4.0},
                },
            }
            for name, error in (("0.q", 0.1), ("0.k", 0.2), ("0.o", 0.3))
        },
    }
    sensitivities = {
        name: {"share": share, "gradient_square": 0.5, "output_square": 4.0}
        for name, share in (("0.q", 1.0), ("0.k", 1.0), ("0.o", 0.25))
    }
    found = Table.of(errors, sensitivities, [["0.q", "0.k"], ["0.o"]])
    assert found.divergence == pytest.approx(np.array([[0.03, 0.3], [0.0075, 0.075]])) and found.size == 192
    assert found.bits.tolist() == [[1024, 512], [512, 256]]
    assert found.described((1, 0))["schemes"] == {"0.q": "rough", "0.k": "rough", "0.o": "fine"}


def test_groups_are_those_that_servers_fuse():
    dense = ModelShape("LlamaForCausalLM", 64, 96, 2, 4, 2, 16, 61)
    assert fused_groups(dense.plan(0)) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert len(linear_groups(dense)) == 8 and len(linear_groups(dense, "linear")) == 14
    sparse = ModelShape("Qwen2MoeForCausalLM", 64, 96, 2, 4, 2, 16, 61, 3, 2, 48, 80, dense_layers=(1,))
    named = {tuple(group) for group in fused_groups(sparse.plan(0))}
    assert {"gate.0", "up.0", "gate.2", "up.2"} <= next({*group} for group in named if "gate.0" in group)
    assert ("down.0", "down.1", "down.2") in named and ("down.shared",) in named
    assert {"gate.shared", "up.shared"} in [{*group} for group in named]
    chosen = {linear: "int4" for group in linear_groups(sparse) for linear in group}
    assert is_tied(sparse, chosen) and not is_tied(sparse, {**chosen, "0.gate.1": "int8"})
