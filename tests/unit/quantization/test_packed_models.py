"""Models loaded from packed checkpoints compute what the definition says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_cases import (
    CASE_OF,
    GRANULAR,
    TRANSFORMS,
    Given,
    case_of,
    quantized,
    saved,
    schemes,
    static_rounding,
    transformed_layers,
)
from quantgrid.calibration.layers import DecoderLayer
from quantgrid.calibration.statistics import SiteStatistics
from quantgrid.ground.storage import read_json
from quantgrid.inference import linear as linear_module
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import END_ROLES, LINEARS, SITE_OF, SITES
from quantgrid.models.shapes import layer_tensors
from quantgrid.quantization.cached import Quantized
from quantgrid.quantization.checkpoints import (
    load_full_precision,
    load_quantized,
)
from quantgrid.quantizer import QuantizationParameters, fake_quantize, find_parameters
from quantgrid.schemes import PRESETS, QuantScheme
from reference_decoder import logits
from reference_statistics import apply_online, close
from tiny_decoders import bare_name


def logits_and_inputs(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, dict[tuple[int, str], Tensor]]:
    """Logits of a running model, and what reaches every site before it is prepared."""
    seen: dict[tuple[int, str], Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for site, linears in SITES.items():
            layer.get_submodule(bare_name(0, linears[0]).removeprefix("model.layers.0.")).register_forward_pre_hook(
                lambda _module, inputs, key=(index, site): seen.update({key: inputs[0]})
            )
    with torch.no_grad():
        return model(tokens).logits.double(), seen


def as_stored(operation: dict) -> dict:
    """An online operation with its tensors as a checkpoint keeps them: float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in operation.items()
    }


def expected_logits(
    made: Given, transform: str, preset: str, granularity: str, done: Quantized, seen: dict | None = None
) -> Tensor:
    """The reference decoder on weights rounded by definition, inputs prepared by a hook, norms and
    biases in float32, ends in bfloat16.

    Where the running model's inputs are ``seen`` they must be those of the reference, and are
    rounded in their place: transformers' norms work in float32, which would turn a rounding here
    and there (bfloat16 embeddings make ties).
    """
    fitted = fit(TRANSFORMS[transform], made.decoder, made.statistics)
    layers, (weight, activation) = transformed_layers(made, fitted), schemes(preset, granularity)
    ends = made.decoder.ends()
    fitted.fold_ends(ends)
    state = {
        END_ROLES[role]: tensor.float() if role == "final_norm" else tensor.bfloat16() for role, tensor in ends.items()
    }
    for layer in layers:
        names = layer_tensors(layer.shape, layer.index)
        for role, tensor in layer.weights.items():
            if role not in LINEARS:
                state[names[role]] = tensor.float()
                continue
            rounded = tensor.bfloat16() if weight is None else rounded_weight(layer, role, weight)
            parts = [done.content.tensors.get(f"{bare_name(layer.index, role)}.{part}") for part in ("left", "right")]
            state[names[role]] = (
                rounded.double() if parts[0] is None else rounded.double() + parts[0].double() @ parts[1].double()
            )

    def hook(index: int, site: str, x: Tensor) -> Tensor:
        if seen is not None:
            assert close(seen[index, site], x, 2e-6), (index, site)
            x = seen[index, site]
        x = apply_online([as_stored(operation) for operation in layers[index].online[site]], x)
        if activation is None:
            return x
        if activation.granularity == "tensor":
            statistics = layers[index].statistics[site]
            return static_rounding(x, statistics.minimum.min().item(), statistics.maximum.max().item())
        return fake_quantize(x, activation, static_parameters(x, activation, layers[index].statistics[site]))

    return logits(state, made.config, made.tokens, hook)


def rounded_weight(layer: DecoderLayer, role: str, scheme: QuantScheme) -> Tensor:
    """The weight rounded to nearest; under ``site`` with the largest value of the linears of its site
    at the largest element and the largest block scale."""
    weight = layer.weights[role].float()
    if scheme.global_scale != "site":
        return fake_quantize(weight, scheme)
    largest = max(layer.weights[other].float().abs().max() for other in SITES[SITE_OF[role]])
    return fake_quantize(weight, scheme, find_parameters(weight, scheme, largest / (scheme.limit * 448)))


def static_parameters(x: Tensor, scheme: QuantScheme, statistics: SiteStatistics) -> QuantizationParameters | None:
    """Parameters under the calibrated global scale; None where the token decides alone."""
    if scheme.global_scale != "static":
        return None
    largest = torch.maximum(-statistics.minimum.min(), statistics.maximum.max()).float()
    return find_parameters(x, scheme, largest / (scheme.limit * 448))


RUNS = [
    (case_of(preset), "none", preset, granularity, rtn)
    for preset, granularity in (*GRANULAR, ("bf16", "channel"), ("w16a4", "channel"))
    if granularity != "tensor" or preset == "int4"
]
RUNS += [
    (case, transform, preset, "channel", rtn)
    for case in CASE_OF
    for transform in ("scaling", "hadamard")
    for preset in ("int4", "bf16")
]
RUNS += [
    (case, transform, preset, "channel", rtn)
    for case in ("llama", "mistral")
    for transform in ("shifting", "blocks", "duquant")
    for preset in ("int4", "bf16")
]
RUNS += [("qwen3", "shifting", "int4", "tensor", rtn)]
RUNS += [
    ("llama", "hadamard", "nvfp4", "channel", rtn),
    ("qwen2", "hadamard", "int4", "tensor", rtn),
    ("mistral", "scaling", "int4", "tensor", rtn),
    ("llama", "hadamard", "int4", "channel", partial(low_rank, rank=4)),
    ("qwen3", "none", "mxfp4", "channel", partial(low_rank, rank=4, metric="qera_exact")),
]


@pytest.mark.parametrize(
    "case, transform, preset, granularity, mitigation",
    RUNS,
    ids=lambda value: (
        getattr(value, "__name__", None) or (f"{value.func.__name__}" if isinstance(value, partial) else str(value))
    ),
)
def test_the_loaded_model_computes_what_the_definition_says(
    case, transform, preset, granularity, mitigation, given, tmp_path
):
    made = given[case]
    done = quantized(made, transform, preset, granularity, mitigation if PRESETS[preset]["weight"] else None)
    found, seen = logits_and_inputs(load_quantized(saved(done, tmp_path), torch.float64), made.tokens)
    assert close(found, expected_logits(made, transform, preset, granularity, done, seen), 2e-6)
    if preset != "bf16":
        assert not close(found, expected_logits(made, transform, "bf16", "channel", done), 1e-3)


@pytest.mark.parametrize(
    "preset, granularity", [("int4", "channel"), ("int4", "tensor"), ("nvfp4", "channel"), ("int4", "group-16")]
)
def test_a_token_does_not_depend_on_its_batch(preset, granularity, given, tmp_path):
    site_input = (
        load_quantized(saved(quantized(given["llama"], "hadamard", preset, granularity), tmp_path))
        .model.layers[1]
        .mlp.down_proj.site_input
    )
    x = torch.randn(8, 24, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None, None]
    assert torch.equal(site_input.prepare(x), torch.cat([site_input.prepare(window[None]) for window in x]))


def test_the_online_hadamard_is_recorded_for_one_site(given, tmp_path):
    saved(quantized(given["llama"], "hadamard"), tmp_path)
    assert read_json(tmp_path / "quantgrid.json")["online"] == {
        f"layers.{layer}.down_input": [{"operation": "hadamard"}] for layer in range(2)
    }


def test_the_tensors_of_online_operations_are_kept_with_the_weights(given, tmp_path):
    done = quantized(given["llama"], "blocks")
    tensors, about = load_file(saved(done, tmp_path) / "model.safetensors"), read_json(tmp_path / "quantgrid.json")
    assert about["online"]["layers.0.mlp_input"] == [
        {"operation": "gather"},
        {"operation": "block_hadamard", "size": 16},
    ]
    assert about["online"]["layers.0.down_input"] == [{"operation": "block_hadamard", "size": 16}]
    order = tensors["layers.0.mlp_input.online.0.order"]
    assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(64))
    assert {name for name in tensors if ".online." in name} == {
        f"layers.{layer}.{site}.online.0.order"
        for layer in range(2)
        for site in ("attention_input", "output_input", "mlp_input")
    }
    model = load_quantized(tmp_path, torch.bfloat16)
    assert not any("online" in name for name in model.state_dict())


def test_online_tensors_run_in_the_dtype_of_the_model(given, tmp_path):
    folder = saved(quantized(given["llama"], "duquant"), tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        site_input = load_quantized(folder, dtype).model.layers[0].mlp.down_proj.site_input
        assert {buffer.dtype for name, buffer in site_input.named_buffers() if "blocks" in name} == {dtype}
        x = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert site_input.prepare(x).dtype == dtype


@pytest.mark.parametrize(
    "transform, operations, added, untied",
    [
        ("none", 0, 0, 0),
        ("scaling", 0, 0, 0),
        ("hadamard", 2 * 96 * (3 + 12), 0, 61 * 64),  # H96 = H12 ⊗ H8
        (
            "shifting",
            2 * (64 + 64 + 96 + 64 * 2 * 4 + 96 * 15),
            2 * (64 + 64 + 96 + 16),
            61 * 64,
        ),  # llama has all biases already
        ("blocks", 2 * (64 * 3 + 96) * 4, 2 * 3 * 64, 0),
        ("duquant", 2 * (64 * 3 + 96) * 2 * 32, 2 * (64 * 3 + 96 + 4 * 2 * 16**2), 0),
    ],
)
def test_what_a_transform_costs_while_the_model_runs(transform, operations, added, untied, given, tmp_path):
    made = given["llama"]
    done = quantized(made, transform)
    expected = {"online_operations": operations, "added_parameters": added, "untied_parameters": untied}
    assert {name: done.costs[name] for name in expected} == expected
    bare = given["mistral"]
    more = quantized(bare, transform).costs["added_parameters"]
    heads, kept = (
        bare.decoder.shape.heads * bare.decoder.shape.head_dim,
        load_file(saved(quantized(bare, transform), tmp_path) / "model.safetensors"),
    )
    assert (
        more == sum(t.numel() for name, t in kept.items() if name.endswith("_proj.bias") or ".online." in name)
        and heads == 128
    )


def test_the_input_of_a_site_is_prepared_once(given, tmp_path, monkeypatch):
    made, calls = given["llama"], []
    model = load_quantized(saved(quantized(made, "hadamard"), tmp_path))
    monkeypatch.setattr(
        linear_module,
        "fake_quantize",
        lambda x, *rest, **options: calls.append(x.shape) or fake_quantize(x, *rest, **options),
    )
    with torch.no_grad():
        first, second = model(made.tokens).logits, model(made.tokens).logits
    assert len(calls) == 2 * 2 * len(SITES) and torch.equal(first, second)
    assert all(
        module._source is None and module._prepared is None
        for module in model.modules()
        if isinstance(module, linear_module.SiteInput)
    )


@pytest.mark.parametrize("transform, tied", [("none", True), ("scaling", True), ("hadamard", False)])
def test_a_tied_head_stays_tied_unless_the_transform_unties_it(transform, tied, given, tmp_path):
    model = load_quantized(saved(quantized(given["llama"], transform), tmp_path))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


def test_full_precision_without_a_transform_is_the_model_in_bfloat16(given, tmp_path):
    made = given["qwen2"]
    model = load_quantized(saved(quantized(made, "none", "bf16", mitigation=None), tmp_path))
    original = load_full_precision(made.folder)
    for name, tensor in original.state_dict().items():
        rounded = tensor if "norm" in name or name.endswith("bias") else tensor.bfloat16().float()
        assert torch.equal(model.state_dict()[name], rounded), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_runs_in_the_dtype_asked_for(dtype, given, tmp_path):
    made = given["llama"]
    folder = saved(quantized(made, "hadamard", "int4", mitigation=partial(low_rank, rank=3)), tmp_path)
    model, exact = load_quantized(folder, dtype), load_quantized(folder, torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and not any(
        parameter.is_meta for parameter in model.parameters()
    )
    with torch.no_grad():
        found, wanted = model(made.tokens).logits, exact(made.tokens).logits
    assert (
        found.dtype == dtype
        and (found.double() - wanted).norm() < (0.3 if dtype == torch.bfloat16 else 0.05) * wanted.norm()
    )
