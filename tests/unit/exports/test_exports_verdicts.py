"""Rules of targets: what is exact, what is bounded, what is refused, and by which loader."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from grid_cases import SHAPE
from quantgrid.exports.compressed_inputs import SERVED_8_BIT_KL, SERVED_KL
from quantgrid.exports.features import Features
from quantgrid.exports.targets import TARGETS, dtype_of, judge
from quantgrid.ground.errors import ConfigError
from quantgrid.models.shapes import ModelShape
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes

CT = "compressed-tensors"
WEIGHTS = {"preset": "w4a16", "weight": {"scale_format": "bf16"}}


def features(entry, granularity="group-64", shape=None, **further) -> Features:
    schemes = CellSchemes.from_dict(cell_schemes(entry, granularity, "test", 64))
    return Features(shape or ModelShape(**SHAPE), schemes, **further)


def refusal(target, *args, flags=(), **further) -> str:
    verdict = judge(target, features(*args, **further), flags=flags)
    assert verdict.kind == "refused" and "nearest" in verdict.text()
    return verdict.text()


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers_with_scales_of_the_model_are_exact(bits):
    verdict = judge(CT, features({"preset": f"int{bits}", "weight": {"scale_format": "bf16"}, "activation": None}))
    assert verdict.text() == "exact"
    assert verdict.loaders == ("transformers", "vLLM") and verdict.kl == 0


def test_scales_wider_than_the_model_are_bounded():
    verdict = judge(CT, features({"preset": "w4a16"}))
    assert verdict.text() == "bound: fp32 scales of weights are rounded to bfloat16"
    assert judge(CT, features({"preset": "w4a16", "weight": {"scale_format": "fp16"}})).kind == "bound"
    assert judge(CT, features({"preset": "w4a16"}), dtype="float32").kind == "exact"


@pytest.mark.parametrize(
    "entry,kind",
    [
        ({"preset": "w8a8", "weight": {"scale_format": "bf16"}, "activation": {"qmax": 127.5}}, "bound"),
        ({"preset": "w8a8", "weight": {"scale_format": "bf16"}}, "bound"),
        ({"preset": "int4_sym", "weight": {"scale_format": "bf16"}, "activation": {"qmax": 7.5}}, "bound"),
        ({"preset": "int4_sym"}, "refused"),
        ({"preset": "mxfp4", "activation": {"scale_rule": "even"}}, "exact"),
        ({"preset": "mxfp4"}, "refused"),
        ({"preset": "mxfp6", "activation": {"scale_rule": "even"}}, "exact"),
        ({"preset": "mxfp8", "activation": {"scale_rule": "rceil"}}, "exact"),
        ({"preset": "mxfp8"}, "bound"),
        ({"preset": "nvfp4", "activation": {"global_scale": "static"}}, "bound"),
        ({"preset": "nvfp4"}, "refused"),
        ({"preset": "mxfp4", "weight": {"scale_rule": "four_thirds"}, "activation": None}, "refused"),
        ({"preset": "int4", "activation": {"range": "mse"}}, "refused"),
        ({"preset": "int4", "activation": {"clip_ratio": 0.9}}, "refused"),
        ({"preset": "int4", "activation": {"range": "percentile"}}, "refused"),
        ({"preset": "int4", "weight": {"range": "mse"}}, "bound"),
        ({"preset": "nf4"}, "refused"),
        ({"preset": "kmeans4"}, "refused"),
        ({"preset": "mxint4", "activation": None}, "exact"),
        ({"preset": "w16a8"}, "refused"),
        ({"preset": "bf16"}, "refused"),
    ],
)
def test_compressed_tensors_follows_what_loaders_compute(entry, kind):
    assert judge(CT, features(entry)).kind == kind


@pytest.mark.parametrize("preset,kl", [("w8a8_served", SERVED_8_BIT_KL), ("w4a4_served", SERVED_KL)])
def test_integer_inputs_are_exact_in_float32_alone(preset, kl):
    verdict = judge(CT, features({"preset": preset}, "channel"))
    assert verdict.bounds == ("exact in float32, but loaders compute scales and quotients of inputs in bfloat16",)
    assert (verdict.check_dtype, verdict.kl, verdict.served_kl) == ("float32", 0, kl)
    exact = judge(CT, features({"preset": preset}, "channel"), dtype="float32")
    assert exact.text() == "exact" and exact.served_kl == 0


def test_every_check_in_another_dtype_has_a_bound_of_the_folder():
    gemma = ModelShape(**{**SHAPE, "architecture": "GemmaForCausalLM"})
    adapted = {"branch_inputs": frozenset({"unquantized"})}
    for given in (features(WEIGHTS, shape=gemma), features(WEIGHTS, **adapted), features({"preset": "int4"})):
        verdict = judge(CT, given)
        assert verdict.check_dtype == "float32" and verdict.kind == "bound" and 0 < verdict.served_kl <= SERVED_KL


def test_vllm_is_left_out_where_it_computes_something_else():
    assert "vLLM below SM100" in judge(CT, features({"preset": "mxfp4", "activation": {"scale_rule": "even"}})).excluded
    static = {"preset": "nvfp4", "activation": {"global_scale": "static"}}
    assert "global scale" in judge(CT, features(static)).excluded["vLLM"]
    assert "vLLM" in judge(CT, features(static, shares_global_scale=True)).loaders
    assert "6-bit" in judge(CT, features({"preset": "mxfp6", "activation": {"scale_rule": "even"}})).excluded["vLLM"]
    assert "vLLM" in judge(CT, features({**WEIGHTS, "linears": ["q", "o"]})).excluded
    assert "vLLM" in judge(CT, features({**WEIGHTS, "linears": ["gate", "up"]})).loaders


def test_asymmetric_packed_weights_are_for_vllm_and_dequantized():
    verdict = judge(CT, features({**WEIGHTS, "weight": {"scale_format": "bf16", "symmetric": False}}))
    assert verdict.kind == "exact" and "transformers" in verdict.excluded
    assert verdict.loaders == ("vLLM", "transformers with CompressedTensorsConfig(dequantize=True)")


def test_online_rotations_need_the_flag():
    online = {"down_input": ("hadamard",)}
    assert "dropped by transformers without a warning" in refusal(CT, WEIGHTS, online=online)
    verdict = judge(CT, features(WEIGHTS, online=online), flags=["online_rotation"])
    assert verdict.kind == "bound" and verdict.loaders == ("transformers with load.py",)
    assert {"transformers", "vLLM"} <= verdict.excluded.keys()
    refusal(CT, WEIGHTS, online={"down_input": ("subtract", "hadamard")}, flags=["online_rotation"])
    for target in ("gptq", "awq", "dense"):
        assert "hadamard at down_input" in refusal(target, WEIGHTS, online=online)


def test_side_terms():
    assert "outliers" in refusal(CT, WEIGHTS, outliers=True)
    assert "learned limits" in refusal(CT, {"preset": "w8a8"}, clips=True)
    rounded = {"preset": "w8a8", "activation": {"qmax": 127.5}}
    assert "unquantized" in refusal(CT, rounded, branch_inputs=frozenset({"quantized"}))
    adapted = judge(CT, features(rounded, branch_inputs=frozenset({"unquantized"})))
    assert adapted.kind == "bound" and "adapter/" in adapted.notes[-1]
    assert "low-rank" in refusal("gptq", WEIGHTS, branch_inputs=frozenset({"unquantized"}))


def test_a_rounded_cache_is_named_as_lost():
    entry = {**WEIGHTS, "key_value": {"preset": "int8", "symmetric": True, "rotate_keys": True}}
    for target in ("compressed-tensors", "gptq", "dense"):
        (loss,) = judge(target, features(entry)).losses
        assert "KV cache" in loss and "R3" in loss


def test_shifts_that_need_a_bias():
    assert judge(CT, features(WEIGHTS, biased=("o", "down"))).kind == "exact"
    qwen = ModelShape(**{**SHAPE, "architecture": "Qwen2ForCausalLM"})
    assert "bias of o" in refusal(CT, WEIGHTS, shape=qwen, biased=("o",))


def test_joined_linears_share_what_one_linear_has():
    phi = ModelShape(**{**SHAPE, "architecture": "Phi3ForCausalLM"})
    static = {"preset": "nvfp4", "activation": {"global_scale": "static"}}
    assert "global_scale: site" in refusal(CT, static, shape=phi)
    assert judge(CT, features(static, shape=phi, shares_global_scale=True)).kind == "bound"
    assert judge("dense", features(static | {"activation": None}, shape=phi)).kind == "bound"
    for target in (CT, "gptq", "awq"):
        assert "global_scale: site" in refusal(target, {"preset": "nvint4", "activation": None}, shape=phi)
    assert "qkv_proj" in refusal(CT, {**WEIGHTS, "linears": ["q"]}, shape=phi)


def test_experts_are_dense_only():
    sparse = replace(
        ModelShape(**{**SHAPE, "architecture": "MixtralForCausalLM"}), experts=4, active_experts=2, expert_size=64
    )
    for target in ("compressed-tensors", "gptq", "awq"):
        assert "TO=dense" in refusal(target, WEIGHTS, shape=sparse)
    assert judge("dense", features(WEIGHTS, shape=sparse)).kind == "bound"


@pytest.mark.parametrize("target", TARGETS)
def test_layer_norms_latent_attention_and_experts_in_one_tensor_are_not_written(target):
    opt = ModelShape(**{**SHAPE, "architecture": "OPTForCausalLM"})
    assert "no target writes the LayerNorms of OPTForCausalLM" in refusal(target, WEIGHTS, shape=opt)
    sparse = {**SHAPE, "architecture": "GptOssForCausalLM", "experts": 4, "active_experts": 2, "expert_size": 64}
    assert "writes the experts in one tensor of GptOss" in refusal(target, WEIGHTS, shape=ModelShape(**sparse))
    linear = {"linear_heads": 4, "linear_key_heads": 2, "linear_head_dim": 16, "linear_key_dim": 8, "convolution": 4}
    linear |= {**SHAPE, "architecture": "Qwen3_5ForCausalLM", "linear_layers": (0,)}
    assert "writes the linear attention of Qwen3_5" in refusal(target, WEIGHTS, shape=ModelShape(**linear))
    latent = {**sparse, "architecture": "DeepseekV3ForCausalLM", "key_value_rank": 32, "plain_key_dim": 32}
    assert "no target writes the latent attention of Deep" in refusal(target, WEIGHTS, shape=ModelShape(**latent))


def test_gptq_and_awq_hold_weights_of_integers():
    assert "does not round activations" in refusal("gptq", {"preset": "w4a8"})
    assert "integers of 4 bits" in refusal("awq", {"preset": "w8a16"})
    assert "integers of" in refusal("gptq", {"preset": "nf4"})
    assert "linears" in refusal("gptq", {**WEIGHTS, "linears": ["q", "k", "v"]})
    odd = ModelShape(**{**SHAPE, "intermediate_size": 1532})
    assert "32-bit words" in refusal("awq", WEIGHTS, "channel", shape=odd)
    assert judge("gptq", features(WEIGHTS)).loaders == ("gptqmodel", "vLLM")


@pytest.mark.parametrize(
    "target,entry,granularity,read",
    [
        ("gptq", "w4a16", "group-128", True),
        ("gptq", "w8a16", "channel", True),
        ("gptq", "w4a16", "tensor", True),
        ("gptq", "int2", "group-64", False),
        ("gptq", "w4a16", "group-16", False),
        ("gptq", "w4a16", "group-256", False),
        ("awq", "w4a16", "group-32", True),
        ("awq", "w4a16", "group-16", False),
    ],
)
def test_vllm_reads_integers_of_its_kernels(target, entry, granularity, read):
    verdict = judge(target, features({"preset": entry, "activation": None}, granularity))
    assert verdict.kind == "bound" and verdict.loaders == ("gptqmodel", "vLLM")[: 1 + read]
    assert read or "has kernels for" in verdict.excluded["vLLM"]


def test_groups_without_a_kernel_are_refused():
    assert "groups of 48" in refusal("gptq", WEIGHTS, "group-48")
    assert "groups of 256" in refusal("awq", WEIGHTS, "group-256")


def test_dtypes_and_flags():
    assert [dtype_of(target) for target in (CT, "gptq", "dense")] == ["bfloat16", "float16", "bfloat16"]
    with pytest.raises(ConfigError, match="gptq accepts float16"):
        judge("gptq", features(WEIGHTS), dtype="bfloat16")
    with pytest.raises(ConfigError, match="unknown target 'onnx'"):
        judge("onnx", features(WEIGHTS))
    with pytest.raises(ConfigError, match="flag 'online_rotation': dense accepts none"):
        judge("dense", features(WEIGHTS), flags=["online_rotation"])
    assert "dtype bfloat16" in judge(CT, features({"preset": "mxfp4", "activation": None}), dtype="float32").text()


def test_verdicts_import_no_torch():
    code = "import sys; import quantgrid.exports.targets; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "scripts"}).returncode == 0


def test_every_target_has_rules():
    assert {"compressed-tensors", "gptq", "awq", "dense"} <= set(TARGETS)


def test_asymmetric_weights_with_inputs_of_both_kinds_are_refused():
    mixed = features({"preset": "int8", "weight": {"symmetric": False}})
    activation = {site: found for site, found in mixed.schemes.activation.items() if site != "down_input"}
    partly = replace(mixed, schemes=replace(mixed.schemes, activation=activation))
    assert judge(CT, mixed).kind == "bound"
    assert "drops the rounding of the other inputs" in judge(CT, partly).text()
