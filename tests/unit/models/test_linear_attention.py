"""Linear attention and output gates: two kinds of layers in one model, and what cannot pass a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from family_cases import OPTIONS, FamilyModel
from learned_cases import recipe, schemes, shaken
from quantgrid.config.planned_features import online_operations
from quantgrid.config.registry import TRANSFORMS
from quantgrid.evaluation.gates import DIVERGENCE, LOGITS, Agreement, transformed_logits
from quantgrid.evaluation.shared_contexts import longest_span
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json
from quantgrid.inference.key_values import round_key_values
from quantgrid.inference.transform import Transform, fit
from quantgrid.machine.memory import kept_bytes
from quantgrid.models.counts import all_weights
from quantgrid.models.families import FAMILIES
from quantgrid.models.folders import shape_of
from quantgrid.models.shapes import Heads, ModelShape, shape_from_config
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.quantization.linear_groups import fused_groups
from quantgrid.schemes import activation_scheme
from quantgrid.schemes.cell_schemes import KeyValueScheme

NAME, MIXTURE = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
TURNED = [name for name, method in TRANSFORMS.items() if "values" in method.options]
LARGE = {
    "architecture": NAME,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layers": 32,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 256,
    "vocabulary": 248320,
    "linear_layers": [layer for layer in range(32) if (layer + 1) % 4],
    "linear_heads": 32,
    "linear_key_heads": 16,
    "linear_head_dim": 128,
    "linear_key_dim": 128,
    "convolution": 4,
}


def turned(made: FamilyModel, name: str, **options: Any) -> Transform:
    """Transform ``name`` with its options, fitted; a learned one as training could leave it."""
    module, resolved = recipe(name, schemes(), 1, **OPTIONS.get(name, {}), **options)
    fitted = fit(module.primitives(**resolved), made.decoder, str(made.statistics))
    return shaken(fitted) if TRANSFORMS[name].learned else fitted


def test_the_layers_of_a_model_have_two_plans(family_model):
    shape = family_model(NAME).decoder.shape
    linear, full = shape.plan(0), shape.plan(1)
    assert list(linear.sites) == ["attention_input", "output_input.linear", "mlp_input", "down_input"]
    assert linear.sites["attention_input"].consumers == ("q.linear", "k.linear", "v.linear", "q.gate", "write", "decay")
    assert fused_groups(linear)[:2] == [["q.linear", "k.linear", "v.linear", "q.gate"], ["o.linear"]]
    assert linear.writers == {"o.linear": None, "down": None} and full.writers == {"o": None, "down": None}
    assert full.caches and not linear.caches
    assert not (linear.sites["output_input.linear"].turns or full.sites["output_input"].turns)
    assert shape.heads_at("output_input.linear") == Heads(4, 1, 16)
    assert shape.heads_at("output_input") == Heads(4, 2, 16)
    assert [count for _, count in shape.plans()] == [1, 1]
    assert shape.linear_size("q") == (128, 64) and shape.linear_size("q.gate") == (64, 64)


@pytest.mark.parametrize("family", [NAME, MIXTURE])
@pytest.mark.parametrize("name", TURNED)
def test_values_turned_at_run_time_are_exact_with_the_stream_rotated_offline(name, family, family_model):
    made = family_model(family)
    with pytest.raises(
        ConfigError, match="a gate stands between them and 'output_input.linear'; rotate online instead"
    ):
        transformed_logits(made.decoder, turned(made, name), made.tokens)
    fitted = turned(made, name, values="online")
    found = transformed_logits(made.decoder, fitted, made.tokens)
    assert Agreement.of(found, made.logits, made.tokens).within(LOGITS, DIVERGENCE)
    layer = made.decoder.layer(0)
    fitted.fold_layer(layer)
    method = TRANSFORMS[name]
    options = method.resolve({"method": name, **OPTIONS.get(name, {}), "values": "online"}, name)["options"]
    planned = online_operations(method, options, made.decoder.shape)["output_input"]
    assert planned == tuple(operation["operation"] for operation in layer.online["output_input.linear"])
    assert not layer.online["attention_input"]


@pytest.mark.parametrize("name", TURNED)
def test_values_that_v_can_take_are_turned_offline_all_the_same(name, family_model):
    made = family_model("LlamaForCausalLM")
    layer = made.decoder.layer(0)
    turned(made, name, values="online").fold_layer(layer)
    mixed = ["head_hadamard"] if name == "quarot" else []
    assert [operation["operation"] for operation in layer.online["output_input"]] == mixed


def test_a_scale_of_outputs_moves_into_the_gain_that_all_heads_share(family_model):
    made = family_model(NAME)
    module, options = recipe("scaling", schemes(), 1, sites=["output_input"])
    before, layer = made.decoder.layer(0), made.decoder.layer(0)
    fit(module.primitives(**options), made.decoder, str(made.statistics)).fold_layer(layer)
    s = before.weights["output_norm"] / layer.weights["output_norm"]
    assert s.shape == (16,) and s.std() > 0.01
    assert torch.allclose(layer.weights["o.linear"], before.weights["o.linear"] * s.repeat(4))
    assert torch.equal(layer.weights["v.linear"], before.weights["v.linear"])


@pytest.mark.parametrize(
    "name, options",
    [
        ("block_hadamard", {"fold_heads": True}),
        ("rotation_then_scaling", {"values": "online", "sites": ["output_input", "mlp_input"]}),
        ("flatquant", {}),
    ],
)
def test_what_is_left_behind_a_gate_is_planned(name, options, family_model):
    made, method = family_model(NAME), TRANSFORMS[name]
    given = {**OPTIONS.get(name, {}), **options}
    module, resolved = recipe(name, schemes(), 1, **given)
    fitted, layer = fit(module.primitives(**resolved), made.decoder, str(made.statistics)), made.decoder.layer(1)
    fitted.fold_layer(layer)
    planned = online_operations(method, method.resolve({"method": name, **given}, name)["options"], made.decoder.shape)
    assert planned["output_input"] == tuple(operation["operation"] for operation in layer.online["output_input"])
    found = transformed_logits(made.decoder, fitted, made.tokens)
    assert Agreement.of(found, made.logits, made.tokens).within(LOGITS, DIVERGENCE)


def test_one_rotation_of_all_heads_is_stored_once(family_model):
    made = family_model(NAME)
    for name in ("random_orthogonal", "optimized_rotation"):
        fitted = turned(made, name, values="online")
        blocks = {}
        for index in range(2):
            layer = made.decoder.layer(index)
            fitted.fold_layer(layer)
            (site,) = layer.plan.sites_of(["output_input"])
            blocks[site] = [len(each["blocks"]) for each in layer.online[site] if "blocks" in each]
        assert {*blocks["output_input.linear"]} == {1} and {*blocks["output_input"]} == {4}


def test_an_order_within_heads_is_refused(family_model):
    made = family_model(NAME)
    module, options = recipe("reorder", schemes(), 1, heads="within")
    with pytest.raises(ConfigError, match="no order within heads passes the gate .* use 'heads: across'"):
        fit(module.primitives(**options), made.decoder, str(made.statistics)).fold_layer(made.decoder.layer(0))


@torch.no_grad()
def test_keys_and_values_are_rounded_in_the_layers_that_cache_them(family_model):
    made = family_model(NAME)
    model = load_full_precision(made.folder, torch.float32)
    wanted = model(made.tokens, use_cache=False).logits
    round_key_values(model, KeyValueScheme(activation_scheme("int8"), True))
    linear, full = model.model.layers
    assert not hasattr(linear.linear_attn, "key_values")
    rounded = model(made.tokens, use_cache=False).logits
    full.self_attn.key_values.rounding = None
    rotated = model(made.tokens, use_cache=False).logits
    assert Agreement.of(rotated, wanted, made.tokens).within(LOGITS, DIVERGENCE)
    assert not Agreement.of(rounded, wanted, made.tokens).within(LOGITS, DIVERGENCE)


def test_continuations_share_no_row_with_linear_attention(family_model):
    """Its state would carry one into the next."""
    from transformers import AutoConfig

    assert longest_span(AutoConfig.from_pretrained(family_model(NAME).folder)) == 0
    assert longest_span(AutoConfig.from_pretrained(family_model("LlamaForCausalLM").folder)) > 0


@pytest.mark.parametrize(
    "changes, layers",
    [
        ({}, (0,)),
        ({"layer_types": None}, (0, 1)),
        ({"layer_types": None, "full_attention_interval": 2}, (0,)),
        ({"layer_types": None, "full_attention_interval": 1}, ()),
        ({"layer_types": ["full_attention", "linear_attention"]}, (1,)),
    ],
)
def test_layers_with_linear_attention_are_listed_or_every_so_many_are_not(changes, layers, family_model):
    config = read_json(family_model(NAME).folder / "config.json")
    assert shape_from_config({**config, **changes}).linear_layers == layers


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_types": ["linear_attention"]}, "is not a list of 'linear_attention' or 'full_attention' for 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: .* is not a list of 'linear_attention' or"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval: 0 is not a whole number"),
        ({"linear_num_value_heads": 3}, "3 heads of values .* are no multiple of 2 heads of keys"),
        ({"linear_conv_kernel_dim": None}, "linear_conv_kernel_dim: None is not a whole number"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_key(changes, message, family_model):
    config = read_json(family_model(NAME).folder / "config.json")
    with pytest.raises(ConfigError, match=message):
        shape_from_config({**config, **changes}, "here")


def test_a_declared_shape_names_the_sizes_of_both_kinds():
    found = shape_of({"source": "hub", "id": "a/b", "shape": LARGE}, "models.x")
    assert found == ModelShape(**{**LARGE, "linear_layers": tuple(LARGE["linear_layers"])})
    assert found.linear_size("v.linear") == (4096, 4096) and found.convolved == 8192
    assert found.widths("heads") == (32, 16) and found.widths("head_dim") == (128, 256)
    mlp, linear, full = 3 * 12288 * 4096, (2 * 2048 + 3 * 4096) * 4096, (2 * 4096 + 2 * 1024 + 4096) * 4096
    assert all_weights(found) == 32 * mlp + 24 * linear + 8 * full
    with pytest.raises(ConfigError, match="x.shape: the keys linear_heads, .*, linear_layers are missing"):
        shape_of({"source": "hub", "shape": {key: LARGE[key] for key in LARGE if key[:6] != "linear"}}, "models.x")
    with pytest.raises(ConfigError, match="x.shape.linear_heads: LlamaForCausalLM has no linear attention"):
        shape_of({"source": "hub", "shape": {**LARGE, "architecture": "LlamaForCausalLM"}}, "models.x")


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_what_a_training_keeps_of_a_layer_is_predicted(kind):
    """By the tensors that autograd saves."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 1}
    sizes |= {"head_dim": 64, "vocab_size": 61, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    saved = []
    for layers in (1, 3):
        config = AutoConfig.for_model("qwen3_5_text", **sizes, num_hidden_layers=layers, layer_types=[kind] * layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        model.model.embed_tokens.weight.requires_grad_(True)
        held: dict[int, torch.UntypedStorage] = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(torch.arange(256)[None] % 61, use_cache=False)
        saved.append(sum(storage.nbytes() for place, storage in held.items() if place not in own))
    shape = shape_from_config({**config.to_dict(), "architectures": [NAME]})
    assert (saved[1] - saved[0]) / 2 / 256 <= kept_bytes(shape) / 3


def test_only_families_with_linear_attention_have_layers_without_a_cache():
    assert [name for name, family in FAMILIES.items() if not family.recurrent.plan.caches] == [NAME, MIXTURE]
