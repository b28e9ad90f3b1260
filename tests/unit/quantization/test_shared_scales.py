"""Global scales of the linears that share an input: equal, the largest of their own, honoured by every
mitigation that declares it."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

from checkpoint_cases import TRANSFORMS, Given, quantized, transformed_layers
from quantgrid.config import registry
from quantgrid.ground.errors import ConfigError
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.bases import solve_base
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.mr_gptq import mr_gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.singular_domain import singular_domain
from quantgrid.mitigations.methods.sparse_outliers import sparse_outliers
from quantgrid.models.plans import LINEARS, SITES
from quantgrid.models.shapes import ModelShape
from quantgrid.quantization.cached import Recipe
from quantgrid.quantization.sequential import Sequential, quantize_sequentially
from quantgrid.quantization.shared_scales import clipped_weight, fused_linears, shared_global_scales
from quantgrid.quantizer import find_parameters
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from tiny_decoders import bare_name

NVFP4, OWN = scheme("nvfp4_served"), scheme("nvfp4")
METHODS = {
    "rtn": rtn,
    "gptq": gptq,
    "running": partial(gptq, scales="running"),
    "mr_gptq": mr_gptq,
    "low_rank": partial(low_rank, rank=2),
    "gptq_low_rank": partial(gptq_low_rank, rank=2, base="mr_gptq"),
    "sparse_outliers": partial(sparse_outliers, rank=4),
}


def stored(tensors, layer: int, linear: str) -> float:
    return tensors[f"{bare_name(layer, linear)}.global_scale"].item()


def wanted(made: Given, transform: str) -> dict[tuple[int, str], float]:
    """Largest magnitude of the weights of a site, at the largest element and block scale."""
    layers = transformed_layers(made, fit(TRANSFORMS[transform], made.decoder, made.statistics))
    return {
        (layer.index, linear): (max(layer.weights[other].float().abs().max() for other in linears) / (6 * 448)).item()
        for layer in layers
        for linears in SITES.values()
        for linear in linears
    }


@pytest.mark.parametrize("name", METHODS)
def test_linears_of_a_site_share_the_largest_global_scale(name, given):
    made = given["llama"]
    done = quantized(made, "hadamard", "nvfp4_served", "channel", METHODS[name])
    expected = wanted(made, "hadamard")
    found = {key: stored(done.content.tensors, *key) for key in expected}
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(len({found[layer, linear] for linear in linears}) == 1 for linears in SITES.values() for layer in (0, 1))
    own = quantized(made, "hadamard", "nvfp4", "channel", METHODS[name]).content.tensors
    assert any(stored(own, *key) < found[key] for key in found) and all(
        stored(own, *key) <= found[key] for key in found
    )


@pytest.mark.parametrize("paired", [False, True], ids=["gptq", "gptaq"])
def test_sequential_propagation_shares_them_too(paired, given):
    made = given["llama"]
    fitted = fit(TRANSFORMS["hadamard"], made.decoder, made.statistics)
    solver = partial(solve_base, "gptaq" if paired else "gptq")
    recipe = Recipe(fitted, CellSchemes(NVFP4), solver, str(made.statistics))
    done = quantize_sequentially(made.decoder, recipe, Sequential(made.tokens, paired=paired))
    expected = wanted(made, "hadamard")
    assert {key: stored(done.content.tensors, *key) for key in expected} == pytest.approx(expected, rel=1e-6)


def test_learned_limits_of_weights_come_first_and_kept_linears_do_not_count(given):
    layer = transformed_layers(given["llama"], fit([], given["llama"].decoder, given["llama"].statistics))[0]
    layer.clips["q"] = lambda weight: weight * 0.5
    assert torch.equal(clipped_weight(layer, "q"), layer.weights["q"].float() * 0.5)
    found = shared_global_scales(layer, CellSchemes(NVFP4, linears=("q", "down")))
    assert found.keys() == {"q", "down"}
    assert found["q"].item() == find_parameters(layer.weights["q"].float() * 0.5, OWN).global_scale.item()
    assert shared_global_scales(layer, CellSchemes(OWN)) == {} == shared_global_scales(layer, CellSchemes())


def test_a_linear_with_the_largest_scale_keeps_its_codes(given):
    layer = transformed_layers(given["llama"], fit([], given["llama"].decoder, given["llama"].statistics))[0]
    shared = shared_global_scales(layer, CellSchemes(NVFP4))
    same = [
        torch.equal(rtn(layer.weights[linear].float(), None, NVFP4, shared[linear]).quantized.codes,
                    rtn(layer.weights[linear].float(), None, OWN).quantized.codes)
        for linear in LINEARS
        if shared[linear].item() == find_parameters(layer.weights[linear].float(), OWN).global_scale.item()
    ]  # fmt: skip
    assert len(same) == len(SITES) and all(same)


def test_experts_share_with_themselves():
    shape = ModelShape(
        architecture="Qwen2MoeForCausalLM",
        hidden_size=64,
        intermediate_size=96,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=61,
        experts=2,
        active_experts=1,
        expert_size=32,
        shared_size=32,
    )
    plan = shape.plan(0)
    groups = [tuple(group) for group in fused_linears(plan)]
    assert ("q", "k", "v") in groups and ("gate.0", "up.0") in groups and ("gate.1", "up.1") in groups
    assert ("gate.shared", "up.shared") in groups and ("down.1",) in groups
    assert sorted(linear for group in groups for linear in group) == sorted(plan.linears)


def test_what_declares_it_takes_a_global_scale_and_nothing_ignores_one():
    for name, method in registry.MITIGATIONS.items():
        if method.shares_scales:
            names = inspect.signature(getattr(registry.load("mitigations", name), name)).parameters
            assert "global_scale" in names or "base_options" in names, name
    with pytest.raises(ConfigError, match="needs a given global_scale"):
        rtn(torch.ones(4, 16), None, NVFP4)
    with pytest.raises(TypeError):
        singular_domain(torch.ones(4, 16), None, NVFP4, global_scale=torch.ones(1, 1))
