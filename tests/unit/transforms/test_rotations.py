"""Rotations, blocks, orders and online operations, apart from function preservation
(test_transforms.py)."""

from __future__ import annotations

import pytest
import torch

from quantgrid.ground.errors import ConfigError
from quantgrid.inference.online import ONLINE, apply, arithmetic, as_rows
from quantgrid.inference.transform import fit, layer_state
from quantgrid.linalg.hadamard import hadamard_matrix
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import SITES
from quantgrid.transforms.primitives.block_rotate import BlockHadamard, GreedyBlocks, greedy_rotation, spreading_matrix
from quantgrid.transforms.primitives.reorder import Reorder, zigzag
from quantgrid.transforms.primitives.rotate import MixHeads, RotateDown, RotateHeads, RotateResidual
from quantgrid.transforms.primitives.rotate_principal import RotatePrincipal
from quantgrid.transforms.primitives.scale import Scale, smoothing_factors
from quantgrid.transforms.primitives.shift import Shift
from quantgrid.transforms.recipes import (
    block_hadamard,
    quarot,
    random_hadamard,
    random_orthogonal,
    reordering,
)
from reference_statistics import apply_online, close, run
from tiny_decoders import CASES, NORM_OF, VARIED
from transform_cases import ALL, GROUPS, INT4, LLAMA, NORMS, changed, folded, heavy

# -- rotations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotations", [["R1"], ["R2"], ["R4"], ["R1", "R4"], ["R1", "R2"], []])
def test_rotations_are_turned_on_by_name(rotations):
    kinds = {"R1": RotateResidual, "R2": RotateHeads, "R4": RotateDown}
    for recipe in (random_hadamard, random_orthogonal):
        assert [type(primitive) for primitive in recipe.primitives(0, rotations)] == [kinds[name] for name in rotations]


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_haar_rotations_keep_lengths(case, given):
    made = given(case)
    transform = made.fitted(random_orthogonal.primitives(3))
    matrices = [transform.parameters["0.model.matrix"], *transform.parameters["1.0.matrices"]]
    for matrix in matrices:
        assert close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), 1e-12)
    result = folded(made, transform)
    rotated = run(result.state, made.config, made.tokens, result.online)[1]
    for index in range(made.decoder.shape.layers):
        for site in ALL:
            before = made.inputs[index, site]
            if site in NORM_OF:  # the gain is in the weights now
                before = before / made.decoder.layer(index).weights[NORM_OF[site]]
            assert close(rotated[index, site].norm(dim=-1), before.norm(dim=-1), 1e-9)
    assert (
        len({tuple(matrix.flatten()[:4].tolist()) for matrix in transform.parameters["1.0.matrices"]})
        == made.decoder.shape.kv_heads
    )


@pytest.mark.parametrize("source", ["activations", "weights"])
def test_principal_axes_are_sorted_by_what_they_hold(source, given):
    made = given(LLAMA)
    primitive = RotatePrincipal("hadamard", 1, source)
    transform = made.fitted([primitive])
    basis = transform.parameters["0.model.basis"]
    assert close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), 1e-12)
    layers = [layer_state(made.decoder, index, made.statistics) for index in range(2)]
    total = 0.0
    for index, state in enumerate(layers):
        for site in NORMS:
            gain = state.weights["attention_norm" if site == "attention_input" else "mlp_norm"]
            x = made.inputs[index, site] / gain
            rows = torch.cat([state.weights[linear] for linear in SITES[site]]) * gain
            total = total + (x.T @ x / len(x) if source == "activations" else rows.T @ rows)
    seen = basis.T @ total @ basis
    assert close(seen, torch.diag(seen.diagonal()), 1e-5) and bool((seen.diagonal().diff() <= 1e-6 * seen.max()).all())


def test_shared_parameters_are_fitted_to_what_came_before(given):
    """Principal axes after a shift are those of the covariance, not of the second moment."""
    made = given(LLAMA)
    plain = made.fitted([RotatePrincipal("hadamard", 1, "activations")]).parameters["0.model.basis"]
    after = made.fitted([Shift("mean", NORMS), RotatePrincipal("hadamard", 1, "activations")])
    assert not close(after.parameters["1.model.basis"].abs(), plain.abs(), 1e-2)
    scaled = made.fitted([Scale(0.5, NORMS), RotatePrincipal("hadamard", 1, "activations")]).parameters["1.model.basis"]
    assert close(scaled.abs(), plain.abs(), 1e-2)  # a scaling of the gain is absorbed with it


def test_mixed_heads_after_rotated_ones_are_one_hadamard_matrix(given):
    """4 heads of 16: (I ⊗ H16)(H4 ⊗ I) = H64, what QuaRot calls the Hadamard heads."""
    made = given(LLAMA)
    result = folded(made, made.fitted([RotateHeads(0, "plain"), MixHeads(0, "hadamard")]))
    rotated = run(result.state, made.config, made.tokens, result.online)[1]
    for index in range(2):
        assert close(rotated[index, "output_input"], made.inputs[index, "output_input"] @ hadamard_matrix(64) / 8, 1e-9)
    assert [type(p) for p in quarot.primitives(0)] == [RotateResidual, RotateHeads, MixHeads, RotateDown]


def test_mixing_heads_needs_their_hadamard_matrix(given):
    made = given(next(case for case in CASES if case.heads == 9))
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 9"):
        made.fitted([MixHeads(0, "hadamard"), Scale(0.5, NORMS)])


# -- blocks ----------------------------------------------------------------------------------------


def test_a_block_rotation_keeps_an_outlier_in_its_block():
    x = torch.zeros(3, 64, dtype=torch.float64).index_fill(1, torch.tensor([21]), 8.0)
    found = apply({"operation": "block_hadamard", "size": 16}, x)
    assert bool((found[:, 16:32].abs() == 2).all()) and not found[:, :16].any() and not found[:, 32:].any()
    everywhere = apply({"operation": "hadamard"}, x)
    assert bool((everywhere.abs() == 1).all())


def test_the_fold_into_v_spares_the_online_operation(given):
    made = given(LLAMA)
    kept, spared = (folded(made, made.fitted(block_hadamard.primitives(16, ALL, fold))) for fold in (False, True))
    assert [len(kept.online[0, site]) for site in ALL] == [1, 1, 1, 1] and [
        len(spared.online[0, site]) for site in ALL
    ] == [1, 0, 1, 1]
    for index in range(2):
        assert close(
            run(kept.state, made.config, made.tokens, kept.online)[1][index, "output_input"],
            run(spared.state, made.config, made.tokens, spared.online)[1][index, "output_input"],
            1e-9,
        )
    # a head has 16 channels
    wide = folded(made, made.fitted(block_hadamard.primitives(32, ["output_input"], True)))
    assert len(wide.online[0, "output_input"]) == 1


@pytest.mark.parametrize(
    "primitive", [BlockHadamard(128, ["down_input"], False), GreedyBlocks(40, ["down_input"], 1, 0, 1, True)]
)
def test_blocks_have_to_divide_a_site(primitive, given):
    with pytest.raises(ConfigError, match=r"do not divide the 96 inputs of site 'down_input'"):
        given(LLAMA).fitted([primitive])


@pytest.mark.parametrize("size", [2, 16, 48])
def test_a_spreading_matrix_is_orthogonal_and_starts_uniform(size):
    matrix = spreading_matrix(size, 0)
    assert close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), 1e-12)
    assert close(matrix[0], torch.full((size,), size**-0.5, dtype=torch.float64), 1e-12)
    assert torch.equal(matrix, spreading_matrix(size, 0)) and (
        size == 2 or not torch.equal(matrix, spreading_matrix(size, 1))
    )


@pytest.mark.parametrize("size", [16, 48])
def test_the_greedy_rotation_lowers_the_peak_of_every_block(size):
    x = heavy(100, 96)
    rotation = greedy_rotation(x, spreading_matrix(size, 0), 40)
    assert rotation.shape == (96 // size, size, size)
    assert close(rotation @ rotation.mT, torch.eye(size, dtype=torch.float64).expand_as(rotation), 1e-11)
    before, after = (
        t.unflatten(-1, (-1, size)).abs().amax((0, 2))
        for t in (x, apply({"operation": "block_rotate", "blocks": rotation}, x))
    )
    assert bool((after <= before * (1 + 1e-6)).all()) and bool((after[before > 10] < 0.8 * before[before > 10]).all())
    assert torch.equal(
        greedy_rotation(x, spreading_matrix(size, 0), 0), torch.eye(size, dtype=torch.float64).expand_as(rotation)
    )


def test_a_shared_rotation_is_that_of_all_blocks_as_one():
    x, spread = heavy(50, 96), spreading_matrix(16, 0)
    shared = greedy_rotation(x, spread, 20, shared=True)
    assert torch.equal(shared, greedy_rotation(x.reshape(-1, 16), spread, 20)) and shared.shape == (1, 16, 16)
    rotated = apply({"operation": "block_rotate", "blocks": shared}, x)
    assert close(rotated, apply({"operation": "block_rotate", "blocks": shared.repeat(6, 1, 1)}, x), 1e-12)
    assert rotated.abs().max() < 0.8 * x.abs().max()


def test_one_step_spreads_a_single_peak_evenly():
    x = torch.zeros(5, 32, dtype=torch.float64).index_fill(1, torch.tensor([7, 20]), 4.0)
    rotation = greedy_rotation(x, spreading_matrix(16, 3), 1)
    assert close(
        apply({"operation": "block_rotate", "blocks": rotation}, x).abs(), torch.ones(5, 32, dtype=torch.float64), 1e-6
    )


def test_a_rotation_that_does_not_help_is_left_out():
    even = torch.ones(4, 16, dtype=torch.float64) * torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)[:, None]
    assert torch.equal(greedy_rotation(even, spreading_matrix(16, 0), 20), torch.eye(16, dtype=torch.float64)[None])


def test_zigzag_deals_back_and_forth():
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    values = heavy(1, 192)[0].abs()
    for size in (16, 48, 192):
        order = zigzag(values, size)
        assert sorted(order.tolist()) == list(range(192))
        sums = values[order].view(-1, size).sum(-1)
        assert size == 192 or sums.max() - sums.min() <= values.max() - values.min() + 1e-12


# -- reordering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["across", "within"])
@pytest.mark.parametrize("case", VARIED, ids=str)
def test_channels_are_in_ascending_order(case, heads, given):
    made = given(case)
    result = folded(made, made.fitted(reordering.primitives("rms", ALL, heads)), "file")
    for layer in result.layers:
        assert [bool(layer.online[site]) for site in ALL] == [True, heads == "across", True, False]
        for site in ALL:
            sizes = layer.statistics[site].magnitude("rms")
            if site == "output_input" and heads == "within":
                sizes = sizes.view(layer.shape.kv_heads, -1, layer.shape.head_dim).amax(1)
            assert bool((sizes.diff() >= 0).all())


def test_an_order_changes_nothing_for_whole_rows_and_something_for_groups(given):
    made = given(LLAMA)
    transform = made.fitted([Reorder("rms", ALL, "across")])
    plain, sorted_ = made.decoder.layer(0), folded(made, transform).layers[0]
    order = transform.parameters["0.0.mlp_input"]
    rows = sorted_.weights["up"][transform.parameters["0.0.down_input"].argsort()]
    whole, grouped = (rtn(rows, None, used) for used in (INT4.weight, GROUPS.weight))
    assert torch.equal(whole.dequantized(), rtn(plain.weights["up"], None, INT4.weight).dequantized()[:, order])
    assert not torch.equal(grouped.dequantized(), rtn(plain.weights["up"], None, GROUPS.weight).dequantized()[:, order])


# -- what may follow what --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "late, site, operation",
    [
        (lambda: RotateResidual("hadamard", 0), "attention_input", "block_hadamard"),
        (lambda: RotateHeads(0), "output_input", "block_hadamard"),
        (lambda: Scale(0.5, ["down_input"]), "down_input", "block_hadamard"),
        (lambda: Shift("mean", ["output_input"]), "output_input", "block_hadamard"),
        (lambda: Reorder("rms", ["down_input"], "across"), "down_input", "block_hadamard"),
    ],
)
def test_what_is_folded_in_before_a_site_cannot_follow_what_is_online_there(late, site, operation, given):
    with pytest.raises(ConfigError, match=f"cannot fold into the weights before '{site}': the online '{operation}'"):
        given(LLAMA).fitted([BlockHadamard(16, ALL, False), late(), Scale(0.5, [])])


def test_scaling_divides_an_online_shift(given):
    made = given(LLAMA)
    transform = made.fitted([Shift("midrange", NORMS), Scale(0.5, NORMS)])
    result = folded(made, transform)
    shift = result.online[0, "mlp_input"][0]["shift"]
    assert close(shift, transform.parameters["0.0.mlp_input"] / transform.parameters["1.0.mlp_input"], 1e-12)


# -- online operations -----------------------------------------------------------------------------

OPERATIONS = [
    ({"operation": "hadamard"}, 96 * (3 + 12)),
    ({"operation": "block_hadamard", "size": 16}, 96 * 4),
    ({"operation": "block_hadamard", "size": 12}, 96 * 12),
    ({"operation": "head_hadamard", "heads": 12}, 96 * 12),
    ({"operation": "head_rotate", "matrix": spreading_matrix(6, 9)}, 96 * 12),
    ({"operation": "signed_hadamard", "signs": heavy(1, 96)[0].sign()}, 96 * (1 + 3 + 12)),
    ({"operation": "multiply", "factor": heavy(1, 96)[0]}, 96),
    ({"operation": "subtract", "shift": heavy(1, 96)[0]}, 96),
    ({"operation": "gather", "order": torch.randperm(96, generator=torch.Generator().manual_seed(0))}, 0),
    ({"operation": "block_rotate", "blocks": torch.stack([spreading_matrix(24, seed) for seed in range(4)])}, 96 * 48),
    ({"operation": "block_rotate", "blocks": spreading_matrix(24, 0)[None]}, 96 * 48),
    ({"operation": "kronecker", "left": heavy(8, 8) / 4, "right": heavy(12, 12) / 4}, 96 * 2 * (8 + 12)),
    ({"operation": "kronecker", "left": heavy(8, 8) / 4}, 96 * 2 * 8),
]


@pytest.mark.parametrize(
    "operation, count", OPERATIONS, ids=lambda value: str(value.get("operation")) if isinstance(value, dict) else ""
)
def test_an_operation_is_its_matrix_in_every_dtype(operation, count):
    x = heavy(7, 96).view(7, 1, 96)
    assert close(apply(operation, x), apply_online([operation], x), 1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        found = as_rows(operation)(x.to(dtype))
        assert (
            found.dtype == dtype
            and found.shape == x.shape
            and close(found.double(), apply_online([operation], x), 0.05)
        )
    assert arithmetic(operation, 96) == count


def test_every_operation_is_tested():
    assert {operation["operation"] for operation, _ in OPERATIONS} == set(ONLINE)


def test_smoothing_factors_keep_dead_channels():
    s = smoothing_factors(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 2.0, 1.0]


def test_fitting_all_layers_together_needs_no_other_statistics(given):
    made = given(LLAMA)
    transform = fit(random_orthogonal.primitives(0, ["R1", "R4"], basis="weights"), made.decoder, None)
    assert changed(made, folded(made, transform)) < 1e-9
