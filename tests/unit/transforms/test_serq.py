"""SERQ (arXiv 2603.08185): its flattening as a transform, and residual columns in the order of the inputs before it."""

from __future__ import annotations

import pytest
import torch

from quantgrid.calibration.statistics import stack
from quantgrid.mitigations.methods.residual_columns import residual_columns
from quantgrid.models.plans import SITES
from quantgrid.schemes import scheme
from quantgrid.transforms.recipes import fold_norms, random_hadamard, scaling
from transform_cases import ALL, HARDEST, folded

INT4 = scheme("int4")
FLATTENING = scaling.primitives(1.0, ALL)


def chosen(layer, site):
    """Columns of the first linear at ``site`` with second codes."""
    weight = layer.weights[layer.plan.sites[site].linears[0]].float()
    return residual_columns(weight[None], stack([layer.statistics[site]]), INT4, rank=3).residual.columns[0]


@pytest.mark.parametrize("before", [[], fold_norms.primitives()], ids=["norms", "norms folded"])
@pytest.mark.parametrize("site", SITES)
def test_behind_the_flattening_columns_come_in_the_order_of_the_inputs_before(site, before, given):
    """At ``output_input`` the heads of a group share a factor."""
    made = given(HARDEST)
    assert made.decoder.shape.heads > made.decoder.shape.kv_heads
    for layer in folded(made, made.fitted([*before, *FLATTENING]), "exact").layers:
        sizes, flat = made.inputs[layer.index, site].abs().amax(0), layer.statistics[site].maximum_absolute
        assert site == "output_input" or torch.allclose(flat, torch.ones_like(flat), rtol=1e-6)
        columns = chosen(layer, site)
        assert 0 < len(columns) < len(sizes)
        assert columns.tolist() == sizes.topk(len(columns)).indices.sort().values.tolist()


@pytest.mark.parametrize("site", ["attention_input", "mlp_input"])
def test_behind_a_rotation_and_the_flattening_the_order_is_that_of_the_rotated_inputs(site, given):
    made = given(HARDEST)
    rotation = random_hadamard.primitives(1, ["R1"])
    turned = folded(made, made.fitted(rotation), "exact").layers
    both = folded(made, made.fitted([*rotation, *FLATTENING]), "exact").layers
    for rotated, layer in zip(turned, both):
        columns = chosen(layer, site)
        sizes = rotated.statistics[site].maximum_absolute
        assert columns.tolist() == sizes.topk(len(columns)).indices.sort().values.tolist()
