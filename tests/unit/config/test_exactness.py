"""Transforms that are not exact on a family of models: refused by name while the workflow is planned, and
accepted with the option that the message names."""

from __future__ import annotations

import pytest

from grid_cases import cells, config, refusal, study, transform
from quantgrid.config import entries
from quantgrid.config.exactness import require_exact
from quantgrid.config.methods import Method
from quantgrid.config.planned_features import online_operations
from quantgrid.config.registry import TRANSFORMS
from quantgrid.ground.errors import ConfigError

LARGE = {"hidden_size": 512, "heads": 12, "kv_heads": 3}  # suits the defaults of every transform
LINEAR = {
    "architecture": "Qwen3_5ForCausalLM",
    "linear_layers": [0],
    "linear_heads": 8,
    "linear_key_heads": 4,
    "linear_head_dim": 64,
    "linear_key_dim": 32,
    "convolution": 4,
}
BOTH, BEHIND = "Gemma3ForCausalLM", "Olmo2ForCausalLM"
# norms behind the linears -> modules that the message names
NORMS = {
    BOTH: "post_attention_layernorm, post_feedforward_layernorm",
    BEHIND: "post_attention_layernorm, post_feedforward_layernorm",
    "Glm4ForCausalLM": "post_self_attn_layernorm, post_mlp_layernorm",
}
ROTATE = (
    "random_hadamard",
    "random_orthogonal",
    "quarot",
    "perq",
    "rotation_then_scaling",
    "optimized_rotation",
    "optimized_rotation_scaling",
    "data_free_rotation",
)
DIVIDE = ("scaling", "awq", "outlier_suppression_plus", "duquant", "optimized_scaling", "flatquant")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_is_accepted_where_norms_stand_before_the_linears_only(name):
    found = cells(study(transforms=["t"]), shape=LARGE, **transform(name))
    assert found[-1].transform == "t"


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("name", ROTATE)
def test_a_rotation_of_the_stream_is_refused_behind_norms_with_what_is_exact(family, name):
    shape, of = {**LARGE, "architecture": family}, study(transforms=["t"])
    message = refusal(of, shape=shape, **transform(name))
    assert message.startswith("studies.a: transform 't' rotates the residual stream")
    assert f"a {family} adds to it behind norms ({NORMS[family]})" in message
    assert "exact is 'residual: online': two rotations a layer at run time" in message
    assert len(cells(of, shape=shape, **transform(name, residual="online"))) == 2


@pytest.mark.parametrize("name", DIVIDE)
def test_a_division_that_no_weights_can_take_is_refused_with_what_is_exact(name):
    shape, of = {**LARGE, "architecture": BEHIND}, study(transforms=["t"])
    message = refusal(of, shape=shape, **transform(name))
    assert message.startswith("studies.a: transform 't' divides the inputs of attention_input, mlp_input")
    assert f"no weights of a {BEHIND} can take the division there; exact is 'division: online'" in message
    assert len(cells(of, shape=shape, **transform(name, division="online"))) == 2
    assert len(cells(of, shape={**shape, "architecture": BOTH}, **transform(name))) == 2


@pytest.mark.parametrize(
    "method, substitute",
    [
        (Method("m", "", rotations=("R1",)), "the method 'random_hadamard' with 'residual: online'"),
        (Method("m", "", divides=("mlp_input",)), "the method 'scaling' with 'division: online'"),
        (Method("m", "", rotations=("R2",)), "the method 'random_hadamard' with 'values: online'"),
    ],
)
def test_a_method_without_the_option_is_refused_with_one_that_has_it(method, substitute):
    shape = {**LARGE, **(LINEAR if "R2" in method.rotations else {"architecture": BEHIND})}
    sizes = entries.shape(config(study(), shape=shape), "m")
    with pytest.raises(ConfigError, match=f"^studies.a: transform 't' .* exact is {substitute}"):
        require_exact(method, {}, sizes, "t", "studies.a")


@pytest.mark.parametrize("name", ROTATE)
def test_a_rotation_of_values_is_refused_behind_a_gate_with_what_is_exact(name):
    shape, of = {**LARGE, **LINEAR}, study(transforms=["t"])
    message = refusal(of, shape=shape, **transform(name))
    assert message.startswith("studies.a: transform 't' turns the values within every head, and the outputs of")
    assert "a Qwen3_5ForCausalLM pass a gate" in message and "exact is 'values: online'" in message
    assert len(cells(of, shape=shape, **transform(name, values="online"))) == 2


def test_a_rotation_of_the_stream_alone_is_accepted_behind_a_gate():
    of = study(transforms=["t"])
    assert len(cells(of, shape={**LARGE, **LINEAR}, **transform("random_hadamard", rotations=["R1", "R4"]))) == 2


def test_an_order_within_heads_is_refused_behind_a_gate():
    shape, of = {**LARGE, **LINEAR}, study(transforms=["t"])
    assert "exact is 'heads: across'" in refusal(of, shape=shape, **transform("reorder", heads="within"))
    assert len(cells(of, shape=shape, **transform("reorder"))) == 2
    assert len(cells(of, shape=shape, **transform("reorder", heads="within", sites=["down_input"]))) == 2


def test_scales_by_head_need_heads_of_one_size():
    by_head = {"formats": {"int4": {"preset": "int4", "activation": {"by_head": True}}}}
    assert len(cells(study(), shape=LARGE, **by_head)) == 2
    assert len(cells(study(), shape={**LARGE, **LINEAR}, **by_head)) == 2
    message = refusal(study(), shape={**LARGE, **LINEAR, "linear_head_dim": 32}, **by_head)
    assert "activation.by_head: model 'm' has heads of 32 and of 64 channels" in message
    assert "groups that divide both, such as group-32" in message


def test_what_stays_online_behind_a_gate_alone_is_planned_there_alone():
    turned = {"output_input": ("multiply", "block_hadamard"), "down_input": ("hadamard",)}
    method, options = TRANSFORMS["random_hadamard"], {"method": "random_hadamard", "values": "online"}
    resolved = method.resolve(options, "t")["options"]
    for shape, wanted in (({**LARGE, **LINEAR}, turned), (LARGE, {"down_input": ("hadamard",)})):
        sizes = entries.shape(config(study(), shape=shape), "m")
        assert online_operations(method, resolved, sizes) == wanted


def test_a_division_of_other_inputs_is_accepted():
    """Those of o and down, which v and up take."""
    of = study(transforms=["t"])
    sites = ["output_input", "down_input"]
    assert len(cells(of, shape={**LARGE, "architecture": BEHIND}, **transform("scaling", sites=sites))) == 2


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "PhiForCausalLM", "Starcoder2ForCausalLM"])
@pytest.mark.parametrize("name", DIVIDE)
def test_a_division_that_an_activation_stops_is_refused_with_what_is_exact(family, name):
    shape, of = {**LARGE, "architecture": family}, study(transforms=["t"])
    sites = {"sites": ["attention_input", "down_input"]} if "sites" in TRANSFORMS[name].options else {}
    divides = "down_input" in TRANSFORMS[name].divided_sites(sites)
    if divides:
        message = refusal(of, shape=shape, **transform(name, **sites))
        assert f"divides the inputs of down_input, and no weights of a {family} can take" in message
        assert len(cells(of, shape=shape, **transform(name, **sites, division="online"))) == 2
    assert len(cells(of, shape={**shape, "architecture": "OPTForCausalLM"}, **transform(name, **sites))) == 2


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("name", ["none", "shifting", "block_hadamard", "reorder"])
def test_other_transforms_are_accepted_behind_norms(family, name):
    found = cells(study(transforms=["t"]), shape={**LARGE, "architecture": family}, **transform(name))
    assert found[-1].transform == "t"
