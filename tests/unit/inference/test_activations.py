"""Activation settings decided by calibration: static scales, the element of a site, and the running
model that uses both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.storage import read_json
from quantgrid.inference.activations import choose, fixed_parameters
from quantgrid.inference.linear import Rounding
from quantgrid.inference.transform import fit, layer_state
from quantgrid.machine import devices
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import SITES
from quantgrid.quantization.cached import Quantized, Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_quantized, save_quantized
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import QuantScheme, activation_scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.transforms.recipes import random_hadamard
from reference_decoder import site_inputs
from reference_statistics import close, statistics_of, write_statistics
from tiny_decoders import Case, random_tokens, save

CASE = Case("LlamaForCausalLM", seed=7)
STATIC = {name: activation_scheme(preset, global_scale="static", **fields) for name, preset, fields in (
    ("nvfp4", "nvfp4", {}), ("nvint4", "nvint4", {}), ("asymmetric", "nvint4", {"symmetric": False}),
    ("per token", "fp4", {"scale_format": "e4m3"}), ("clipped", "nvfp4", {"clip_ratio": 0.9}))}  # fmt: skip


def tokens_of(n: int = 32, count: int = 50) -> Tensor:
    """(count, n) with outlier channels, one large token, and values of both signs."""
    x = torch.randn(count, n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-1, 1, n)
    x[3] *= 20
    return x


@pytest.mark.parametrize("name", STATIC)
def test_a_static_global_scale_spans_every_block_of_the_calibration(name):
    """Symmetric: the tensor's own global scale, to the bit. Asymmetric: no block of a token may
    exceed the span of its channels."""
    x, scheme = tokens_of(), STATIC[name]
    found = fixed_parameters(statistics_of(x), scheme)
    assert (
        list(found) == ["global_scale"]
        and found["global_scale"].dtype == torch.float32
        and found["global_scale"].numel() == 1
    )
    per_tensor = replace(scheme, global_scale="tensor")
    block = scheme.group_size or x.shape[-1]
    low, high = (end.float().view(-1, block) for end in (x.amin(0), x.amax(0)))
    widest = (high.amax(-1).clamp(min=0) - low.amin(-1).clamp(max=0)).max() if not scheme.symmetric else x.abs().max()
    wanted = widest * scheme.clip_ratio / (per_tensor.limit * scheme.storage.maximum)
    assert torch.isclose(found["global_scale"].squeeze(), wanted, rtol=1e-6)
    if scheme.symmetric:
        assert torch.equal(Rounding(scheme, found)(x), fake_quantize(x, per_tensor))


@pytest.mark.parametrize("preset", ["nvfp4", "fp8", "int8", "mxfp4"])
def test_what_finds_its_own_scales_needs_none_from_calibration(preset):
    assert fixed_parameters(statistics_of(tokens_of()), activation_scheme(preset)) == {}


def test_a_scale_per_tensor_is_wholly_static():
    x, scheme = tokens_of(), activation_scheme("int4", granularity="tensor")
    found = fixed_parameters(statistics_of(x), scheme)
    assert set(found) == {"scale", "zero_point"}
    assert torch.equal(Rounding(scheme, found)(x), fake_quantize(x, scheme))
    saturated = Rounding(scheme, found)(x * 10)
    assert saturated.amax() <= x.amax() * 1.1 and saturated.amin() >= x.amin() * 1.1


@pytest.mark.parametrize(
    "scheme",
    [*STATIC.values(), activation_scheme("nvfp4"), activation_scheme("int4", granularity="tensor")],
    ids=[*STATIC, "token", "tensor"],
)
def test_a_token_depends_on_no_other(scheme):
    x = tokens_of()
    rounding = Rounding(scheme, fixed_parameters(statistics_of(x), scheme))
    assert torch.equal(rounding(x[None]), torch.stack([rounding(token[None]) for token in x], 1))


def test_a_dynamic_global_scale_depends_on_the_window_and_has_to_be_asked_for():
    x = tokens_of()
    asked = Rounding(activation_scheme("nvfp4", global_scale="tensor"), {})
    assert not torch.equal(asked(x)[:3], asked(x[:3])) and torch.equal(asked(torch.stack([x, x / 3]))[0], asked(x))
    assert activation_scheme("nvfp4").global_scale == "token"


# -- the element of a site -------------------------------------------------------------------------


def squared_error(x: Tensor, scheme: QuantScheme) -> float:
    return ((fake_quantize(x, scheme) - x).double().square().sum() / x.double().square().sum()).item()


def test_the_candidate_of_least_error_is_chosen():
    int4, fp4 = (activation_scheme("int4_sym", element=element) for element in ("int4", "e2m1"))
    generator = torch.Generator().manual_seed(0)
    short_tailed = torch.rand(40, 64, generator=generator) * 2 - 1
    heavy_tailed = torch.randn(40, 64, generator=generator) * torch.logspace(-2, 1, 64)
    for x, wanted in ((short_tailed, int4), (heavy_tailed, fp4)):
        for candidates in ([int4, fp4], [fp4, int4]):
            rounding, errors = choose(candidates, statistics_of(x))
            assert rounding.scheme == wanted and min(errors, key=errors.get) == wanted.element
            assert all(abs(errors[scheme.element] - squared_error(x, scheme)) < 1e-9 for scheme in candidates)


@pytest.mark.parametrize("granularity", ["channel", "group-32", "tensor"])
def test_signed_or_unsigned_floats_go_by_the_error_and_the_unsigned_brings_its_zero_point(granularity):
    found = cell_schemes({"preset": "fp4", "activation": {"element": ["e2m1", "ue2m2"]}}, granularity, "test", 64)
    candidates = [QuantScheme.from_dict(fields) for fields in found["activation"]["down_input"]]
    assert [scheme.symmetric for scheme in candidates] == [True, False]
    normal = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    for x, wanted in ((normal * torch.logspace(-1, 0.5, 64), "e2m1"), (torch.nn.functional.silu(normal * 2), "ue2m2")):
        rounding, errors = choose(candidates, statistics_of(x))
        assert rounding.scheme.element == wanted and errors[wanted] == min(errors.values())
        assert all(abs(errors[scheme.element] - squared_error(x, scheme)) < 1e-9 for scheme in candidates)


def test_one_candidate_is_no_choice_and_the_first_of_equals_wins():
    x, scheme = tokens_of(), activation_scheme("fp4")
    rounding, errors = choose([scheme], statistics_of(x))
    assert rounding.scheme == scheme and errors == {}
    candidates = [activation_scheme("int4_sym", element=element) for element in ("e2m1", "int4")]
    assert choose(candidates, statistics_of(torch.zeros(4, 32)))[0].scheme == candidates[0]


# -- a decoder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config, state = CASE.build(torch.float32)
    path = save(tmp_path_factory.mktemp("model"), config, state)
    write_statistics(path / "statistics", site_inputs(state, config, random_tokens(config, 8, 24)))
    return path


def quantized(folder: Path, preset: str, granularity: str = "channel", **activation) -> Quantized:
    found = cell_schemes({"preset": preset, "activation": activation}, granularity, "test", CASE.head_dim)
    transform = fit(random_hadamard.primitives(1), DecoderFolder(folder), None)
    return quantize_decoder(
        DecoderFolder(folder), Recipe(transform, CellSchemes.from_dict(found), rtn, folder / "statistics")
    )


def loaded(done: Quantized, path: Path):
    save_quantized(done.content, path / "model.safetensors", path / "quantgrid.json", {"axes": {}})
    return load_quantized(path), read_json(path / "quantgrid.json")


def site_input(model, layer: int, site: str):
    part = model.model.layers[layer]
    return {
        "attention_input": part.self_attn.q_proj,
        "output_input": part.self_attn.o_proj,
        "mlp_input": part.mlp.gate_proj,
        "down_input": part.mlp.down_proj,
    }[site].site_input


def test_static_global_scales_are_those_of_the_transformed_statistics_and_lie_in_the_checkpoint(folder, tmp_path):
    done = quantized(folder, "nvfp4", global_scale="static")
    model, manifest = loaded(done, tmp_path)
    transform = fit(random_hadamard.primitives(1), DecoderFolder(folder), None)
    for index in range(CASE.layers):
        layer = layer_state(DecoderFolder(folder), index, folder / "statistics")
        transform.fold_layer(layer)
        for site in SITES:
            name, statistics = f"layers.{index}.{site}", layer.statistics[site]
            wanted = (statistics.maximum_absolute.max() / (6 * 448)).float()
            stored = done.content.tensors[f"{name}.global_scale"]
            assert (
                torch.isclose(stored.squeeze(), wanted, rtol=1e-6)
                and manifest["activations"][name]["global_scale"] == "static"
            )
            rounded = site_input(model, index, site).rounding(statistics.samples.float())
            assert torch.equal(
                rounded, fake_quantize(statistics.samples.float(), activation_scheme("nvfp4", global_scale="tensor"))
            )
    assert not any(name.endswith("_input.scale") for name in done.content.tensors)


@pytest.mark.parametrize("granularity", ["channel", "group-32"])
def test_by_head_rounds_every_head_of_a_token_by_itself(granularity, folder, tmp_path):
    model, manifest = loaded(quantized(folder, "int4", granularity, by_head=True), tmp_path)
    x = tokens_of(64)
    scheme = activation_scheme("int4", granularity=granularity)
    for index in range(CASE.layers):
        by_head = torch.cat([fake_quantize(head, activation_scheme("int4")) for head in x.split(CASE.head_dim, -1)], -1)
        assert torch.equal(site_input(model, index, "output_input").prepare(x), by_head)
        assert torch.equal(site_input(model, index, "attention_input").prepare(x), fake_quantize(x, scheme))
        assert manifest["activations"][f"layers.{index}.output_input"]["group_size"] == CASE.head_dim


def test_every_site_takes_its_best_element_and_says_so(folder, tmp_path, monkeypatch):
    done = quantized(folder, "int4_sym", element=["int4", "e2m1"], by_head=True)
    model, manifest = loaded(done, tmp_path)
    chosen = {name: choice["element"] for name, choice in done.choices.items()}
    assert len(chosen) == 4 * CASE.layers and set(chosen.values()) <= {"int4", "e2m1"}
    single = {element: quantized(folder, "int4_sym", element=element, by_head=True) for element in ("int4", "e2m1")}
    assert not single["int4"].choices
    for name, element in chosen.items():
        _, layer, site = name.split(".")
        scheme = activation_scheme(
            "int4_sym", element=element, **({"group_size": CASE.head_dim} if site == "output_input" else {})
        )
        assert manifest["activations"][name] == scheme.to_dict() == single[element].content.activations[name].to_dict()
        assert torch.equal(
            site_input(model, int(layer), site).rounding(tokens_of(96)), fake_quantize(tokens_of(96), scheme)
        )
        errors = done.choices[name]["input_error"]
        assert errors[element] == min(errors.values()) and set(errors) == {"int4", "e2m1"}
        linear = f"{layer}.{SITES[site][0]}"
        assert done.errors[linear]["joint_output_error"] == single[element].errors[linear]["joint_output_error"]
    monkeypatch.setattr(devices, "LARGE", 1)
    assert quantized(folder, "int4_sym", element=["int4", "e2m1"], by_head=True).choices == done.choices


def test_static_scales_of_candidates_are_their_own(folder, tmp_path):
    done = quantized(folder, "int4_sym", "tensor", element=["int4", "e2m1"])
    model, _ = loaded(done, tmp_path)
    layer = layer_state(DecoderFolder(folder), 1, folder / "statistics")
    fit(random_hadamard.primitives(1), DecoderFolder(folder), None).fold_layer(layer)
    samples = layer.statistics["mlp_input"].samples.float()
    wanted = fake_quantize(
        samples,
        activation_scheme("int4_sym", granularity="tensor", element=done.choices["layers.1.mlp_input"]["element"]),
    )
    assert close(site_input(model, 1, "mlp_input").prepare(samples), wanted, 1e-6)
