"""Stored bits of cells whose transform leaves something online, against the bytes of the
checkpoint's file."""

from __future__ import annotations

import math
from functools import partial

import pytest
from safetensors.torch import load_file

from checkpoint_cases import Given, everywhere, saved, schemes
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.residual_columns import residual_columns
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.sparse_outliers import sparse_outliers
from quantgrid.models.plans import SITES
from quantgrid.quantization.cached import Quantized, Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import CheckpointContent
from quantgrid.quantization.transform_costs import online_operations
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes, KeyValueScheme
from quantgrid.transforms.primitives.affine import Affine
from quantgrid.transforms.recipes import (
    block_hadamard,
    duquant,
    flatquant,
    quarot,
    random_hadamard,
    reordering,
    shifting,
)

ALL = list(SITES)
WEIGHT = scheme("int4", granularity="channel")
RECIPES = {  # with matrices, orders or shifts that a checkpoint stores
    "duquant": duquant.primitives(3, 0.6, 16, 4, ALL, True),
    "duquant, a rotation per block": duquant.primitives(3, 0.6, 16, 4, ALL, False),
    "affine": [Affine(ALL, 1)],
    "reordering": reordering.primitives("rms", ALL, "across"),
    "flatquant": flatquant.primitives(CellSchemes(WEIGHT), 1, 0.5, True),
    "quarot, any number of heads": quarot.primitives(2, "orthogonal"),
    "shifting": shifting.primitives("midrange", ALL),
}
FREE = {
    "hadamard": random_hadamard.primitives(1),
    "blocks": block_hadamard.primitives(16, ALL, False),
}  # online without anything stored


def quantized(made: Given, primitives: list, preset: str = "int4", granularity: str = "channel") -> Quantized:
    weight, activation = schemes(preset, granularity)
    recipe = Recipe(
        fit(primitives, made.decoder, made.statistics),
        CellSchemes(weight, everywhere(activation)),
        rtn if weight else None,
        made.statistics,
    )
    return quantize_decoder(made.decoder, recipe)


def bits_on_disk(made: Given, done: Quantized, folder) -> tuple[float, int]:
    """(bits per weight of all that the file holds but the model's norms, biases, embedding and
    lm_head, its tensors)."""
    unrounded = {name for name in load_file(made.folder / "model.safetensors") if not name.endswith("_proj.weight")} | {
        "lm_head.weight"
    }
    kept = {
        name: tensor
        for name, tensor in load_file(saved(done, folder) / "model.safetensors").items()
        if name not in unrounded
    }
    weights = sum(entry["size"] for entry in done.errors.values())
    return 8 * sum(tensor.nbytes for tensor in kept.values()) / weights, len(kept)


@pytest.mark.parametrize("case", ["llama", "mistral"])  # with biases and without
@pytest.mark.parametrize("name", RECIPES)
def test_what_runs_online_is_part_of_the_stored_bits(name, case, given, tmp_path):
    made = given[case]
    done = quantized(made, RECIPES[name])
    (expected, tensors), found = bits_on_disk(made, done, tmp_path), done.summary()
    weights = sum(entry["size"] for entry in done.errors.values())
    assert math.isclose(
        found["stored_bits"], expected, abs_tol=8 * tensors / weights
    )  # zero points of odd length are padded to a byte
    parameters = sum(t.numel() for key, t in load_file(tmp_path / "model.safetensors").items() if ".online." in key)
    assert found["added_bits"] >= 32 * parameters / weights > 0 and (found["online_operations"] > 0) == (
        name != "reordering"
    )
    # as the paper counts: the linears alone
    assert found["bits"] == quantized(made, []).summary()["bits"]


@pytest.mark.parametrize("name", FREE)
def test_a_hadamard_transform_has_operations_and_no_bits(name, given, tmp_path):
    done = quantized(given["llama"], FREE[name])
    assert done.summary()["added_bits"] == 0 and done.summary()["online_operations"] > 0
    assert math.isclose(done.summary()["stored_bits"], bits_on_disk(given["llama"], done, tmp_path)[0], abs_tol=1e-3)


def test_new_biases_and_fixed_ranges_are_stored(given, tmp_path):
    shifted = quantized(
        given["mistral"], shifting.primitives("mean", ["output_input"])
    )  # folds into o's bias, which the model has not
    assert shifted.summary()["added_bits"] > 0 and shifted.costs["added_parameters"] > 0
    fixed = quantized(given["llama"], [], granularity="tensor")
    assert math.isclose(fixed.summary()["stored_bits"], bits_on_disk(given["llama"], fixed, tmp_path)[0], abs_tol=1e-3)
    assert fixed.summary()["added_bits"] > 0 == fixed.costs["added_parameters"]


def test_what_is_not_rounded_counts_the_online_matrices_as_well(given):
    done = quantized(given["llama"], RECIPES["duquant"], "bf16")
    assert done.summary()["stored_bits"] == 16 + done.costs["added_bits"] > 16.1
    weights = sum(entry["size"] for entry in done.errors.values())
    assert math.isclose(
        done.costs["added_bits"], 32 * done.costs["added_parameters"] / weights
    )  # blocks in float32, orders in int32


@pytest.mark.parametrize("rotated", [True, False])
def test_the_rotation_of_queries_and_keys_counts_its_operations(rotated, given):
    decoder = given["llama"].decoder
    shape, content = decoder.shape, CheckpointContent({}, CellSchemes(None, {}, KeyValueScheme(WEIGHT, rotated)))
    assert shape.head_dim & (shape.head_dim - 1) == 0
    fast = shape.layers * (shape.heads + shape.kv_heads) * shape.head_dim * (shape.head_dim.bit_length() - 1)
    assert online_operations(content, decoder) == (fast if rotated else 0)


@pytest.mark.parametrize(
    "mitigation",
    [
        rtn,
        partial(low_rank, rank=4),
        partial(sparse_outliers, rank=4),
        partial(residual_columns, rank=4),
    ],
    ids=["rtn", "low_rank", "sparse_outliers", "residual_columns"],
)
def test_what_a_mitigation_stores_is_in_the_bits_of_its_linears_alone(mitigation, given):
    made = given["llama"]
    recipe = Recipe(fit([], made.decoder, made.statistics), CellSchemes(WEIGHT), mitigation, made.statistics)
    assert quantize_decoder(made.decoder, recipe).costs["added_bits"] == 0
