"""Exported folders loaded by transformers with compressed-tensors: the logits are those of the cell."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from export_cases import BF16, BLOCKS, SERVED, cell, logits
from family_models import some_tokens
from quantgrid.exports.export import export
from quantgrid.exports.packed_cell import PackedCell
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json, read_tensors, sha256_of, write_json, write_tensors
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.quantization.checkpoints import load_quantized
from quantgrid.transforms.primitives.rotate import RotateDown
from quantgrid.transforms.recipes import random_hadamard, shifting

CT = "compressed-tensors"
WEIGHTS = {"preset": "w4a16", "weight": BF16}
FAMILIES = [
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    ("Phi3ForCausalLM", {}),
    ("Gemma3ForCausalLM", {"tie_word_embeddings": True}),
    pytest.param("LlamaForCausalLM", {}, marks=pytest.mark.slow),
    pytest.param("Qwen2ForCausalLM", {}, marks=pytest.mark.slow),
    pytest.param("Qwen3ForCausalLM", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
]
BARE = {"attention_bias": False, "mlp_bias": False}


def exported(source, folder, entry, granularity="channel", target=CT, transform=(), flags=(), **how):
    made = cell(source, folder / "cell", entry, granularity, transform, **how)
    return export(source.model, made, None, source.windows, target, folder / "out", flags)


@pytest.mark.parametrize("architecture,settings", FAMILIES)
def test_families_load_with_equal_logits(sources, tmp_path, architecture, settings):
    report = exported(sources(architecture, **settings), tmp_path, SERVED["w4a4"])
    assert report["verdict"]["bounds"] == [
        "exact in float32, but loaders compute scales and quotients of inputs in bfloat16"
    ]
    assert report["check"]["max_logit_difference"] == 0
    assert 0 < report["check"]["served_kl"] <= report["check"]["served_kl_accepted"] == 0.5
    assert report["check"]["perplexity"] == pytest.approx(report["check"]["cell_perplexity"], rel=1e-6)


@pytest.mark.parametrize("name", ["w3a16", "mxfp4", "fp8"])
def test_served_formats_load_with_equal_logits(sources, tmp_path, name):
    granularity = "group-32" if name == "w3a16" else "channel"
    report = exported(sources(), tmp_path, SERVED[name], granularity)
    assert report["check"]["max_logit_difference"] == 0
    assert report["check"]["dtype"] == ("bfloat16" if name in (*BLOCKS, "w3a16") else "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture,settings,name",
    [
        *((*FAMILIES[0], name) for name in SERVED),
        *((*family, name) for family in FAMILIES[1:3] for name in ("w4a16", "w4a8", "fp8", "mxfp4", "mxfp8")),
    ],
)
def test_every_served_format_of_every_kind_of_family(sources, tmp_path, architecture, settings, name):
    report = exported(sources(architecture, **settings), tmp_path, SERVED[name])
    gains, check = architecture.startswith("Gemma"), report["check"]
    rounds_gains = gains and name in BLOCKS
    assert report["verdict"]["kind"] == ("bound" if gains or check["dtype"] == "float32" else "exact")
    if name != "mxfp8" and not rounds_gains:
        assert report["check"]["max_logit_difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry,granularity",
    [
        ({"preset": "w8a8"}, "tensor"),
        ({"preset": "fp8"}, "tensor"),
        ({"preset": "int4_sym", "weight": BF16, "activation": {"qmax": 7.5}}, "group-16"),
        ({"preset": "int4"}, "channel"),
        ({"preset": "int8"}, "channel"),
        ({"preset": "int4_asym"}, "channel"),
        ({"preset": "mxint4", "activation": None}, "channel"),
        ({"preset": "nvfp4", "activation": {"global_scale": "static"}}, "channel"),
        ({"preset": "nvfp4", "activation": None}, "channel"),
        ({"preset": "mxfp8"}, "channel"),
        ({"preset": "w4a16"}, "group-24"),
    ],
)
def test_bounded_and_rarer_formats_stay_within_their_bound(sources, tmp_path, entry, granularity):
    sizes = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 192} if granularity == "group-24" else {}
    report = exported(sources("LlamaForCausalLM", **sizes), tmp_path, entry, granularity)
    assert report["check"]["kl"] <= report["check"]["kl_accepted"] or report["check"]["max_logit_difference"] == 0


def test_asymmetric_weights_load_dequantized_and_the_card_says_so(sources, tmp_path):
    entry = {**WEIGHTS, "weight": {**BF16, "symmetric": False}}
    report = exported(sources(), tmp_path, entry, "group-32")
    assert report["check"]["max_logit_difference"] == 0
    assert "dequantize=True" in (tmp_path / "out" / "README.md").read_text()


def test_a_rounded_subset_of_linears_has_targets_and_ignored_ones(sources, tmp_path):
    report = exported(sources(), tmp_path, {**WEIGHTS, "linears": ["gate", "up", "down"]}, "group-32")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert report["check"]["max_logit_difference"] == 0
    assert config["ignore"] == ["lm_head", *(f"re:.*self_attn[.]{linear}_proj$" for linear in "qkvo")]


def test_elements_chosen_by_site_make_a_group_each(sources, tmp_path):
    made = cell(sources(), tmp_path / "cell", SERVED["w8a8"])
    about = read_json(made / "quantgrid.json")
    del about["activations"]["layers.1.down_input"]
    write_json(made / "quantgrid.json", about)
    export(sources().model, made, None, sources().windows, CT, tmp_path / "out")
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"]
    assert [bool(group["input_activations"]) for group in groups.values()] == [True, False]
    assert groups["group_1"]["targets"] == ["model.layers.1.mlp.down_proj"]


def test_a_shift_folds_into_biases_that_the_config_turns_on(sources, tmp_path):
    source = sources(**BARE)
    report = exported(
        source, tmp_path, WEIGHTS, "group-32", transform=shifting.primitives("midrange", ["output_input"])
    )
    config = read_json(tmp_path / "out" / "config.json")
    assert config["attention_bias"] is True and not config["mlp_bias"]
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.o_proj.bias"].abs().max() > 0
    assert tensors["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0
    assert report["check"]["max_logit_difference"] == 0


def test_rotations_that_fold_are_not_seen_by_the_loader(sources, tmp_path):
    transform = [part for part in random_hadamard.primitives(1) if not isinstance(part, RotateDown)]
    report = exported(sources(), tmp_path, SERVED["w8a8"], transform=transform)
    assert report["check"]["max_logit_difference"] == 0


def test_an_online_rotation_is_refused_or_loaded_by_its_file(sources, tmp_path):
    from transformers import AutoModelForCausalLM

    made, source = cell(sources(), tmp_path / "cell", WEIGHTS, "group-32", [RotateDown()]), sources()
    with pytest.raises(ConfigError, match="dropped by transformers without a warning"):
        export(source.model, made, None, source.windows, CT, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export(source.model, made, None, source.windows, CT, tmp_path / "out", ["online_rotation"])
    assert 0 <= report["check"]["kl"] < 1e-4
    config = read_json(tmp_path / "out" / "config.json")
    (group,) = config["quantization_config"]["transform_config"]["config_groups"].values()
    assert group["type"] == "hadamard" and group["head_dim"] == 128 and group["apply"][0]["location"] == "input"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "load.py" in card and "drops the rotation without a warning" in card
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    tokens = some_tokens(1)
    assert (logits(plain, tokens) - logits(load_quantized(made, torch.bfloat16), tokens)).abs().max() > 0.1


def test_low_rank_terms_are_an_adapter_over_the_export(sources, tmp_path):
    report = exported(sources(), tmp_path, WEIGHTS, "group-32", mitigation=functools.partial(low_rank, rank=4))
    assert report["check"]["loader"] == "transformers with PEFT" and report["check"]["max_logit_difference"] < 1e-4
    adapter = tmp_path / "out" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    assert "base_model_relation: adapter" in (adapter / "README.md").read_text()
    factors = read_tensors(adapter / "adapter_model.safetensors")
    assert factors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 128)


def test_vllm_reads_global_scales_that_a_site_shares(sources, tmp_path):
    made = cell(sources(), tmp_path / "cell", {"preset": "nvfp4", "activation": None})
    assert not PackedCell(made).features().shares_global_scale
    tensors = read_tensors(made / "model.safetensors")
    tensors = {name: torch.ones_like(t) if name.endswith("global_scale") else t for name, t in tensors.items()}
    write_tensors(made / "model.safetensors", tensors)
    about = read_json(made / "quantgrid.json")
    write_json(made / "quantgrid.json", {**about, "sha256": sha256_of(made / "model.safetensors")})
    assert PackedCell(made).features().shares_global_scale


def test_dense_folders_load_with_equal_logits(sources, tmp_path):
    report = exported(sources("Phi3ForCausalLM"), tmp_path, {"preset": "nf4"}, "group-16", "dense")
    assert report["check"]["max_logit_difference"] == 0


@pytest.mark.parametrize(
    "entry,how",
    [
        ({"preset": "nvfp4", "activation": None}, {}),
        ({"preset": "nvint4", "activation": None}, {}),
        (WEIGHTS, {"mitigation": functools.partial(low_rank, rank=4)}),
        ({**WEIGHTS, "linears": ["k", "gate"]}, {}),
        ({**WEIGHTS, "linears": ["q", "up"]}, {}),
    ],
    ids=["nvfp4", "nvint4", "low_rank", "later_parts", "some_parts"],
)
def test_dense_folders_join_parts_of_any_kind(sources, tmp_path, entry, how):
    """Parts with global scales of their own, with low-rank terms, rounded in part."""
    source = sources("Phi3ForCausalLM")
    made = cell(source, tmp_path / "cell", entry, "group-16", **how)
    report = export(source.model, made, None, source.windows, "dense", tmp_path / "out", dtype="float32")
    assert report["check"]["max_logit_difference"] < (1e-4 if how else 1e-5)
    assert 4 < report["bits_per_weight"] <= 5


def test_dense_experts_load_under_their_own_names(sources, tmp_path):
    source = sources("MixtralForCausalLM")
    made = cell(source, tmp_path / "cell", {"preset": "nf4"}, "group-16")
    report = export(source.model, made, None, source.windows, "dense", tmp_path / "out", dtype="float32")
    assert report["check"]["kl"] < 1e-9 and report["check"]["max_logit_difference"] < 1e-4
    names = read_tensors(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.4.w2.weight" in names


def test_a_rounded_cache_is_left_out_of_the_comparison(sources, tmp_path):
    entry = {**WEIGHTS, "key_value": {"preset": "int4_sym"}}
    report = exported(sources(), tmp_path, entry, "group-32")
    assert report["check"]["max_logit_difference"] == 0
    assert "KV cache" in report["verdict"]["losses"][0]
