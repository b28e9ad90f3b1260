"""Latent attention: further narrow inputs, keys in two parts, one linear for keys and values."""

from __future__ import annotations

import pytest
import torch

from family_cases import FamilyModel
from quantgrid.calibration.accumulators import site_name
from quantgrid.calibration.collect import collect
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.config.cell_checks import check_key_value
from quantgrid.evaluation.gates import DIVERGENCE, LOGITS, Agreement
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json
from quantgrid.inference.input_maps import BlockMap
from quantgrid.inference.key_values import round_key_values
from quantgrid.models.families import FAMILIES
from quantgrid.models.folders import shape_of, verify_shape
from quantgrid.models.shapes import ModelShape, shape_from_config
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.quantization.linear_groups import fused_groups
from quantgrid.quantization.shared_scales import fused_linears
from quantgrid.schemes import activation_scheme
from quantgrid.schemes.cell_schemes import KeyValueScheme
from quantgrid.transforms.primitives.learned import LearnedR1
from reference_statistics import close, statistics_of
from selection import others_slow

NAMES = [name for name, family in FAMILIES.items() if family.latents]
NAME = "DeepseekV2ForCausalLM"
SITES = {"attention_input.query": "q_b_proj", "attention_input.key_value": "kv_b_proj"}
LARGE = {
    "architecture": "DeepseekV3ForCausalLM",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "layers": 61,
    "heads": 128,
    "kv_heads": 128,
    "head_dim": 128,
    "vocabulary": 129280,
    "experts": 256,
    "active_experts": 8,
    "expert_size": 2048,
    "shared_size": 2048,
    "dense_layers": [0, 1, 2],
    "query_rank": 1536,
    "key_value_rank": 512,
    "plain_key_dim": 128,
    "rotary_dim": 64,
}


@pytest.mark.parametrize("transform", ["fold_norms", "random_hadamard", "scaling", "shifting", "block_hadamard"])
def test_transforms_pass_the_latent_inputs(transform, family_model):
    """Also those of the narrow inputs: their gains are far from one."""
    made = family_model(NAME)
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"  # whose kernels sum by the shape of their input
    assert made.model_gate.logits <= (1e-6 if wide else 0)
    assert made.transform_gate(transform).within(LOGITS, DIVERGENCE)


@pytest.mark.parametrize("name", others_slow(NAMES, "DeepseekV3ForCausalLM".__eq__))
def test_queries_may_have_no_latent_input(name, tmp_path):
    """The tiny model of the family has the other of both."""
    made = FamilyModel.make(name, tmp_path / "model", q_lora_rank=24 if name == "DeepseekV3ForCausalLM" else None)
    plan = made.decoder.shape.plan(1)
    assert plan.sites["attention_input"].linears == (
        ("q.a", "k.a") if name == "DeepseekV3ForCausalLM" else ("q", "k.a")
    )
    assert made.model_gate.logits <= 1e-5
    assert list(plan.sites["attention_input"].linears) in list(fused_linears(plan))
    assert made.transform_gate("random_hadamard").within(LOGITS, DIVERGENCE)


def test_sites_and_groups_of_a_layer(family_model):
    plan = family_model(NAME).decoder.shape.plan(0)
    assert list(plan.sites)[:4] == ["attention_input", *SITES, "output_input"]
    assert plan.linears_of(["q", "k", "v"]) == ["q.a", "q.b", "k.a", "k", "v"]
    assert plan.norms == ("attention_norm", "query_norm", "key_value_norm", "mlp_norm")
    assert [site.name for site in plan.stream_sites] == ["attention_input", "mlp_input"]
    assert fused_groups(plan)[:4] == [["q.a", "k.a"], ["q.b"], ["k", "v"], ["o"]]
    assert not plan.expert_sites and len(family_model(NAME).decoder.shape.plan(1).expert_sites) == 6


def test_a_learned_rotation_turns_the_inputs_that_read_the_stream_alone(family_model):
    shape, rotation = family_model(NAME).decoder.shape, LearnedR1()
    found = {
        site: rotation.input_map(site, shape, rotation.fit_model(shape), BlockMap()) for site in shape.plan(1).sites
    }
    assert [site for site in found if not found[site].is_empty] == ["attention_input", "mlp_input"]


@torch.no_grad()
def test_statistics_are_those_of_the_inputs_of_transformers_own_linears(family_model):
    from transformers import AutoModelForCausalLM

    made, seen = family_model(NAME), {}
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float64, experts_implementation="eager")
    for site, linear in SITES.items():
        module = model.model.layers[1].self_attn.get_submodule(linear)
        module.register_forward_pre_hook(lambda _, inputs, site=site: seen.update({site: inputs[0]}))
    model(made.windows, use_cache=False)
    found = collect(streamed(FullPrecision(made.folder)), made.windows, samples=16)
    for site, x in seen.items():
        ours, wanted = found[site_name(1, site)], statistics_of(x.flatten(0, -2))
        assert ours.count == made.windows.numel()
        assert close(ours.second_moment, wanted.second_moment, 1e-5)
        assert close(ours.maximum, wanted.maximum, 1e-5)


@torch.no_grad()
def test_keys_are_rotated_over_both_parts_of_a_head(family_model):
    made = family_model(NAME)
    model = load_full_precision(made.folder, torch.float32)
    wanted = model(made.tokens, use_cache=False).logits
    round_key_values(model, KeyValueScheme(activation_scheme("int8"), True))
    sizes: list[tuple[int, int]] = []
    for layer in model.model.layers:
        held = layer.self_attn.key_values
        held.rounding = None
        held.register_forward_pre_hook(lambda _, inputs: sizes.append((inputs[1].shape[-1], inputs[2].shape[-1])))
    rotated = model(made.tokens, use_cache=False).logits
    assert {*sizes} == {(made.decoder.shape.key_dim, made.decoder.shape.head_dim)} == {(32, 8)}
    assert Agreement.of(rotated, wanted, made.tokens).within(LOGITS, DIVERGENCE)
    assert not torch.equal(rotated, wanted)


@pytest.mark.parametrize(
    "group, rotate, key_part, message",
    [
        (16, False, 16, "group size 16 does not divide the 8 channels of a head"),
        (None, True, 11, "rotate_keys needs a Hadamard matrix of order 27"),
    ],
)
def test_sizes_of_keys_and_of_values_are_checked(group, rotate, key_part, message, family_model):
    config = read_json(family_model(NAME).folder / "config.json")
    shape = shape_from_config({**config, "qk_nope_head_dim": key_part})
    with pytest.raises(ConfigError, match=message):
        check_key_value({"scheme": {"group_size": group}, "rotate_keys": rotate}, shape, "here")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (NAME, {"num_key_value_heads": 2}, "4 heads and 2 key-value heads; latent attention has as many of both"),
        (NAME, {"kv_lora_rank": 0}, "kv_lora_rank: 0 is not a whole number"),
        (NAME, {"kv_lora_rank": None}, "kv_lora_rank: None is not a whole number"),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense"]}, "is not a list of 'dense' or 'sparse' for 2 layers"),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense", 1]}, "is not a list of 'dense' or 'sparse'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_key(name, changes, message, family_model):
    config = read_json(family_model(name).folder / "config.json")
    with pytest.raises(ConfigError, match=message):
        shape_from_config({**config, **changes}, "here")


def test_layers_with_experts_are_listed_one_by_one(family_model):
    config = read_json(family_model("Glm4MoeLiteForCausalLM").folder / "config.json")
    assert shape_from_config(config).dense_layers == (0,)
    assert shape_from_config({**config, "mlp_layer_types": None}).dense_layers == (0,)
    assert shape_from_config({**config, "mlp_layer_types": ["sparse", "dense"]}).dense_layers == (1,)


def test_a_declared_shape_names_its_ranks():
    found = shape_of({"source": "hub", "id": "a/b", "shape": LARGE}, "models.x")
    assert found == ModelShape(**{**LARGE, "dense_layers": (0, 1, 2)}) and found.key_dim == 192
    assert found.linear_size("q.b") == (128 * 192, 1536) and found.linear_size("k.a") == (576, 7168)
    direct = {key: value for key, value in LARGE.items() if key != "query_rank"}
    assert shape_of({"source": "hub", "shape": direct}).linear_size("q") == (128 * 192, 7168)
    with pytest.raises(ConfigError, match="query_rank is 1536, declared 0"):
        verify_shape(found, direct)
    with pytest.raises(ConfigError, match="x.shape: the keys key_value_rank are missing"):
        shape_of({"source": "hub", "shape": {key: LARGE[key] for key in LARGE if key != "key_value_rank"}}, "models.x")
    with pytest.raises(ConfigError, match="x.shape.query_rank: Glm4MoeForCausalLM has no latent attention"):
        shape_of({"source": "hub", "shape": {**LARGE, "architecture": "Glm4MoeForCausalLM"}}, "models.x")
