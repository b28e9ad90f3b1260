"""Features of planned cells: the declared online operations, biases and limits of transforms are those
that the transforms leave in a layer."""

from __future__ import annotations

import inspect

import pytest
import torch

from grid_cases import config, study
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.config import registry
from quantgrid.config.cells import Cell
from quantgrid.config.planned_features import online_operations, planned_features, planned_verdict, shifted_sites
from quantgrid.exports.verdicts import BOUND, EXACT, REFUSED
from quantgrid.inference.transform import fit, layer_state
from quantgrid.models.plans import SITES, kind_of
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from reference_decoder import site_inputs
from reference_statistics import write_statistics
from tiny_decoders import CASES, random_tokens, save

INT4 = CellSchemes.from_dict(cell_schemes({"preset": "int4_sym"}, "channel", "here"))
SMALL = {"block_size": 16}
VARIANTS = {
    "shifting": [{"sites": [site]} for site in SITES],
    "outlier_suppression_plus": [{"shifted_sites": ["output_input", "down_input"]}],
    "scaling": [{"division": "online", "sites": list(SITES)}],
    "random_hadamard": [{"rotations": ["R1", "R2"]}, {"rotations": ["R4"]}, {"residual": "online"}],
    "random_orthogonal": [{"rotations": ["R1", "R2"]}, {"residual": "online"}],
    "quarot": [{"mixing": "orthogonal"}, {"residual": "online"}, {"values": "online"}],
    "block_hadamard": [{"fold_heads": True}, {"sites": ["down_input"]}],
    "duquant": [{"sites": ["mlp_input"]}],
    "reorder": [{"heads": "within"}, {"sites": ["down_input"]}, {"sites": ["output_input"]}],
    "rotation_then_scaling": [{"residual": "online"}, {"residual": "online", "sites": ["output_input"]}],
    "optimized_rotation": [{"residual": "online"}],
    "optimized_rotation_scaling": [{"residual": "online"}, {"residual": "online", "basis": "none"}],
    "flatquant": [{"clip_activations": False}, {"division": "online"}],
    "data_free_rotation": [{"residual": "online"}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    case = next(case for case in CASES if case.architecture.startswith("Llama") and case.hidden == 64 and not case.bias)
    given, state = case.build(torch.float32)
    folder, tokens = save(tmp_path_factory.mktemp("model"), given, state), random_tokens(given, 4, 24)
    statistics = write_statistics(folder / "statistics", site_inputs(state, given, tokens))
    return DecoderFolder(folder), statistics


def resolved(name, options):
    method = registry.method("transforms", name)
    small = {key: value for key, value in SMALL.items() if key in method.options}
    return method, method.resolve({"method": name, **small, **options}, "here")["options"]


def folded(made, name, options):
    """(layer 0 with the transform at its start, roles of its weights before)."""
    decoder, statistics = made
    function = registry.load("transforms", name).primitives
    names = inspect.signature(function).parameters
    given = {key: value for key, value in options.items() if key in names or "_training" in names or "_" in names}
    given |= {"seed": 1} if "seed" in names else {}
    given |= {"schemes": INT4} if "schemes" in names else {}
    layer = layer_state(decoder, 0, statistics)
    before = set(layer.weights)
    fit(function(**given), decoder, statistics).fold_layer(layer)
    return layer, before


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in registry.TRANSFORMS for options in ({}, *VARIANTS.get(name, ()))],
    ids=str,
)
def test_what_a_transform_declares_is_what_it_leaves_in_a_layer(name, options, made):
    method, chosen = resolved(name, options)
    layer, before = folded(made, name, chosen)
    left = {site: tuple(found["operation"] for found in operations) for site, operations in layer.online.items()}
    assert online_operations(method, chosen, layer.shape) == {site: names for site, names in left.items() if names}
    added = {role.removesuffix("_bias") for role in set(layer.weights) - before}
    sites = shifted_sites(method, chosen)
    assert added == {linear for site in sites for linear in SITES[site]} | ({"v"} if "output_input" in sites else set())
    assert bool(layer.input_clips) == method.clips_activations(chosen)
    assert all(kind_of(site) in SITES for site in left)


def cell_of(format="w4a16_g64", transform="none", mitigation="rtn", granularity="group-64"):
    return Cell("m", transform, mitigation, granularity, format)


def planned(cell, **entries):
    return planned_features(config(study(), **entries), cell)


def test_side_terms_are_those_of_the_mitigation():
    assert planned(cell_of(mitigation="gptq_low_rank")).branch_inputs == {"quantized"}
    entry = {"mitigations": {"x": {"method": "low_rank", "rank": 0}, "y": {"method": "sparse_outliers", "rank": 0}}}
    assert planned(cell_of(mitigation="x"), **entry).branch_inputs == frozenset()
    assert planned(cell_of(mitigation="sparse_outliers")).outliers
    assert planned(cell_of(mitigation="residual_columns")).outliers
    assert not planned(cell_of(mitigation="y"), **entry).outliers and not planned(cell_of()).outliers


def test_a_rotation_that_is_chosen_by_layer_is_in_some_of_them():
    entry = {"transforms": {"t": {"method": "random_hadamard", "choose": ["R4"]}}}
    assert planned(cell_of(transform="t"), **entry).online == {"down_input": ("hadamard in some layers",)}
    found = planned_verdict(config(study(), **entry), cell_of(transform="t"), "compressed-tensors")
    assert found.kind == REFUSED and "hadamard in some layers" in found.text()


def test_biases_are_those_that_the_architecture_lacks():
    shape = {"architecture": "Qwen2ForCausalLM"}
    entry = {"transforms": {"t": {"method": "shifting", "sites": ["attention_input", "mlp_input"]}}}
    given = config(study(), shape=shape, **entry)
    assert planned_features(given, cell_of(transform="t")).biased == ("gate", "up")
    assert planned(cell_of(transform="t"), **entry).biased == ("q", "k", "v", "gate", "up")


@pytest.mark.parametrize(
    ("cell", "target", "kind"),
    [
        (cell_of(), "compressed-tensors", EXACT),
        (cell_of("w8a8_served", granularity="channel"), "compressed-tensors", BOUND),
        (cell_of("mxfp8_served", granularity="group-32"), "compressed-tensors", EXACT),
        (cell_of("nvfp4_served", granularity="group-16"), "compressed-tensors", BOUND),
        (cell_of("int4", granularity="channel"), "gptq", REFUSED),
        (cell_of(transform="random_hadamard"), "compressed-tensors", REFUSED),
        (cell_of("nf4", granularity="channel"), "compressed-tensors", REFUSED),
    ],
    ids=str,
)
def test_verdicts_of_planned_cells(cell, target, kind):
    found = planned_verdict(config(study()), cell, target)
    assert found.kind == kind, found.text()
    assert (kind == REFUSED) == bool(found.refusals) and "\n" not in found.text()


def test_a_shared_global_scale_serves_vllm_too():
    served, own = (
        planned_verdict(config(study()), cell_of(preset, granularity="group-16"), "compressed-tensors")
        for preset in ("nvfp4_served", "nvfp4")
    )
    assert any(loader.startswith("vLLM") for loader in served.loaders) and own.kind == REFUSED
