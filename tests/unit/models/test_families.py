"""Every family: the streamed model computes what transformers' own computes, and the data that describe
the family agree with transformers' classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from family_cases import DENSE, QUICK
from quantgrid.evaluation.gates import LOGITS, Agreement, check_model, own_logits, streamed_logits
from quantgrid.ground.errors import ConfigError, UnsupportedModel
from quantgrid.ground.places import ROOT
from quantgrid.ground.storage import read_json
from quantgrid.models.families import FAMILIES
from quantgrid.models.family import Family
from quantgrid.models.fetch import KEPT, fetch
from quantgrid.models.folders import check_folder
from quantgrid.models.plans import Stored
from quantgrid.models.positions import has_position_table, positions_in, require_positions
from quantgrid.models.shapes import shape_from_config
from quantgrid.models.weight_headers import tensor_headers, verify_weights
from selection import others_slow

TOKENIZER = ROOT / "tests" / "data" / "tiny-llama" / "tokenizer.json"
ALL = others_slow(FAMILIES, QUICK.__contains__)
LAYER = "model.layers.1."
LAYERS, LAST = 4, "model.layers.3."  # of the smallest models; the last of four has no linear attention by default
# families that transformers cannot build from a config.json without head_dim, or the number of KV heads
NEED_HEAD_DIM = ("MinistralForCausalLM", "HunYuanDenseV1ForCausalLM")
NEED_KV_HEADS = ("NemotronForCausalLM",)
SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")  # of GPT-2
# keys of transformers' config classes that have no effect on the logits of a model in evaluation mode
HARMLESS = {
    "initializer_range": "initial weights",
    "use_cache": "speed",
    "pretraining_tp": "slices of the same products, no longer read",
    "attention_dropout": "training",
    "residual_dropout": "training",
    "resid_pdrop": "training",
    "embd_pdrop": "training",
    "eod_token_id": "text generation",
    "output_router_logits": "more outputs",
    "router_aux_loss_coef": "training",
    "router_jitter_noise": "training",
    "num_mtp_layers": "layers that predict further tokens",
    "sep_token_id": "text generation",
    "init_std": "initial weights",
    "qk_head_dim": "sum of two other keys",
    **dict.fromkeys(("dropout", "hidden_dropout", "embedding_dropout", "attn_pdrop", "layerdrop"), "training"),
    **dict.fromkeys(("classifier_dropout", "is_decoder"), "other classes of the model"),
    **dict.fromkeys((f"summary_{of}" for of in SUMMARY), "other classes of the model"),
}


def noise(name: str) -> float:
    """Accepted error of a logit: none, or that of another order of a sum: over experts, in LayerNorm."""
    return 0.0 if name in DENSE and not FAMILIES[name].centered else 1e-5


# -- the model gate --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_streamed_model_is_transformers_own(name, family_model):
    made = family_model(name)
    assert made.model_gate.logits <= noise(name)
    assert check_model("tiny", made.folder, made.tokens, layers=1)["logits"] <= LOGITS
    first = own_logits(made.folder, made.tokens, layers=1)
    assert Agreement.of(first, made.logits, made.tokens).logits > 0.1  # the second layer counts


@pytest.mark.parametrize("name", ALL)
def test_a_fetched_model_is_the_model_it_was_fetched_from(name, family_model, tmp_path):
    """Only some keys of config.json are kept: those that count."""
    made = family_model(name)
    source = shutil.copytree(made.folder, tmp_path / "source")
    shutil.copy(TOKENIZER, source)
    fetch({"source": "local", "path": str(source)}, tmp_path / "fetched")
    found, wanted = streamed_logits(tmp_path / "fetched", made.tokens), own_logits(source, made.tokens)
    assert Agreement.of(found, wanted, made.tokens).logits <= noise(name)


# -- the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_no_key_that_counts_is_dropped(name):
    family = FAMILIES[name]
    known = {*KEPT, *family.settings, *family.only, *PreTrainedConfig().to_dict(), *HARMLESS}
    assert not AutoConfig.for_model(family.model_type).to_dict().keys() - known


def minimal(family: Family, name: str, **settings: Any) -> dict[str, Any]:
    """Smallest config.json: what it leaves out takes the family's default."""
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": LAYERS, "vocab_size": 61}
    sizes["num_attention_heads"] = 64
    return {
        "architectures": [name],
        "model_type": family.model_type,
        **{family.keys.get(key, key): size for key, size in sizes.items()},
        "pad_token_id": 0,
        **({"head_dim": 2} if name in NEED_HEAD_DIM else {}),
        **({"num_key_value_heads": 64} if name in NEED_KV_HEADS else {}),
        **settings,
    }


def empty(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' own model of a config.json, without numbers."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def settings_of(family: Family) -> list[dict[str, Any]]:
    """Settings that change the tensors of a family: none, each bias, tied and untied, one head size."""
    biases = sorted({key for key in family.biases.values() if isinstance(key, str)})
    has_heads = hasattr(AutoConfig.for_model(family.model_type), "num_key_value_heads")
    heads = {"num_key_value_heads": 4, **({} if family.centered else {"head_dim": 6})} if has_heads else {}
    return [
        {},
        *({key: given} for key in biases for given in (True, False)),
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        heads,
        *([{"num_key_value_heads": None}] if replaces_null(family, "num_key_value_heads") else []),
    ]


def replaces_null(family: Family, key: str) -> bool:
    """Whether transformers reads a null in config.json and puts a number in its place."""
    try:
        return getattr(AutoConfig.for_model(family.model_type, **{key: None}), key) is not None
    except StrictDataclassFieldValidationError:
        return False


@pytest.mark.parametrize("name", others_slow(DENSE, QUICK.__contains__))
def test_what_a_config_leaves_out_is_what_transformers_assumes(name):
    """Every tensor has the name and the size that transformers gives it: none is missing, none is left."""
    family = FAMILIES[name]
    for settings in settings_of(family):
        config = minimal(family, name, **settings)
        model, shape = empty(config), shape_from_config(config)
        own, state = model.config, model.state_dict()
        attention = model.get_submodule(family.in_files(LAST.rstrip("."))).get_submodule(family.attention)
        head_dim = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
        kv_heads = getattr(own, "num_key_value_heads", own.num_attention_heads)
        assert (shape.kv_heads, shape.head_dim) == (kv_heads, head_dim), settings
        assert family.is_tied(config) == own.tie_word_embeddings, settings
        if own.tie_word_embeddings:
            del state["lm_head.weight"]
        headers = {
            family.files.get("lm_head", "lm_head") + key.removeprefix("lm_head") if key[:7] == "lm_head" else key: {
                "dtype": "F32",
                "shape": list(tensor.shape),
            }
            for key, tensor in state.items()
        }
        verify_weights(headers, shape, str(settings), config)
        places = {linear: family.plan.tensors[f"{linear}_bias"] for linear in family.linears}
        stored = {linear: family.plan.stored.get(place, Stored(place)).name for linear, place in places.items()}
        held = {linear for linear, place in stored.items() if family.in_files(LAST + place) in state}
        assert {*family.biased(config)} == held, settings


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name):
    family = FAMILIES[name]
    own = AutoConfig.for_model(family.model_type).to_dict()
    assert {key: own[key] for key in family.defaults} == dict(family.defaults)
    given = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False}
    left = {key for key, value in given.items() if key not in family.defaults}
    left -= {"num_key_value_heads"} if name in NEED_KV_HEADS else {*family.keys}
    bare = AutoConfig.for_model(family.model_type, hidden_size=96, num_attention_heads=24)
    assert "num_key_value_heads" not in left or getattr(bare, "num_key_value_heads", 24) == 24
    assert "head_dim" not in left or getattr(bare, "head_dim", None) in (None, 4)
    assert "tie_word_embeddings" not in left or not bare.tie_word_embeddings


ONLY = {
    "OPTForCausalLM": {"do_layer_norm_before": False, "activation_function": "gelu"},
    "GPT2LMHeadModel": {"add_cross_attention": True},
    "PhiForCausalLM": {"qk_layernorm": True},
    "StableLmForCausalLM": {"use_parallel_residual": True, "qk_layernorm": True},
    "NemotronForCausalLM": {"hidden_act": "silu"},
    "CohereForCausalLM": {"use_qk_norm": True},
    "Ernie4_5_MoeForCausalLM": {"use_bias": True},
    "DeepseekV2ForCausalLM": {"mlp_bias": True},
}


@pytest.mark.parametrize("name, key", [(name, key) for name, values in ONLY.items() for key in values])
def test_parts_that_a_family_does_not_describe_are_refused_with_the_obstacle(name, key, family_model):
    config = read_json(family_model(name).folder / "config.json")
    supported, obstacle = FAMILIES[name].only[key]
    with pytest.raises(UnsupportedModel, match=f"here: {name} with {key}: {ONLY[name][key]!r} has {obstacle}"):
        shape_from_config({**config, key: ONLY[name][key]}, "here")
    assert shape_from_config({**config, key: supported}) == family_model(name).decoder.shape


@torch.no_grad()
def test_names_without_their_beginning_are_read(family_model, tmp_path):
    """As in the published files of GPT-2."""
    made = family_model("GPT2LMHeadModel")
    folder = Path(shutil.copytree(made.folder, tmp_path / "bare"))
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TOKENIZER, folder)
    assert check_folder(folder) == made.decoder.shape
    assert torch.equal(streamed_logits(folder, made.tokens), made.logits)


def test_a_table_of_positions_ends(family_model):
    folder = family_model("OPTForCausalLM").folder
    assert positions_in(folder) == 128 and has_position_table(folder)
    assert not has_position_table(family_model("LlamaForCausalLM").folder)
    entry = {"window": 129, "beyond_positions": True}
    require_positions(entry, 128, "corpora.c", "model 'm'")
    with pytest.raises(ConfigError, match="longer than the 128 positions of model 'm' .* its table has no more"):
        require_positions(entry, 128, "corpora.c", "model 'm'", table=True)


# -- tensors that nothing reads, and missing ones --------------------------------------------------

# (family, tensor below the second layer, its size in the file or None for missing, message)
WRONG: dict[str, tuple[str, str, tuple[int, ...] | None, str]] = {
    "norm before attention": (
        "Olmo2ForCausalLM",
        "input_layernorm.weight",
        (64,),
        "hold 'model.layers.1.input_layernorm.weight', which Olmo2ForCausalLM with this config.json leaves out; its",
    ),
    "norm of queries": ("LlamaForCausalLM", "self_attn.q_norm.weight", (16,), "hold 'model.layers.1.self_attn.q_norm"),
    "no norm of queries": ("Gemma3ForCausalLM", "self_attn.q_norm.weight", None, "no tensor .*1.self_attn.q_norm"),
    "norm of a head": ("Olmo2ForCausalLM", "self_attn.k_norm.weight", (16,), r"k_norm.weight' is \(16,\) .* \(32,\)"),
    "no post-norm": ("Glm4ForCausalLM", "post_mlp_layernorm.weight", None, "no tensor .*1.post_mlp_layernorm"),
    "short post-norm": ("Gemma3ForCausalLM", "post_feedforward_layernorm.weight", (63,), r"\(63,\) in .*, \(64,\) by"),
    "no joined linear": ("Phi3ForCausalLM", "mlp.gate_up_proj.weight", None, "no tensor .*1.mlp.gate_up_proj.weight"),
    "part of a joined linear": ("Phi3ForCausalLM", "self_attn.q_proj.weight", (64, 64), "q_proj.weight', which Phi3"),
    "values left out": ("Phi3ForCausalLM", "self_attn.qkv_proj.weight", (96, 64), r"\(96, 64\) in .*, \(128, 64\) by"),
    "joined bias": ("Phi3ForCausalLM", "self_attn.qkv_proj.bias", (128,), "qkv_proj.bias', which .*attention_bias"),
    "gate alone": ("Glm4ForCausalLM", "mlp.gate_up_proj.weight", (96, 64), r"\(96, 64\) in .*, \(192, 64\) by"),
    "sinks": ("LlamaForCausalLM", "self_attn.sinks", (4,), "hold 'model.layers.1.self_attn.sinks'.* would be dropped"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_too_many_too_few_or_of_another_size_is_named(case, family_model):
    name, tensor, size, message = WRONG[case]
    folder = family_model(name).folder
    config, headers = read_json(folder / "config.json"), tensor_headers([folder / "model.safetensors"])
    shape = shape_from_config(config)
    verify_weights(headers, shape, "here", config)
    if size is None:
        del headers[LAYER + tensor]
    else:
        headers[LAYER + tensor] = {"dtype": "F32", "shape": list(size)}
    with pytest.raises(ConfigError, match=message):
        verify_weights(headers, shape, "here", config)


@pytest.mark.parametrize("name", ["SmolLM3ForCausalLM", "LlamaForCausalLM"])
def test_an_lm_head_counts_unless_it_is_the_embedding(name, family_model):
    folder = family_model(name).folder
    config, headers = read_json(folder / "config.json"), tensor_headers([folder / "model.safetensors"])
    tied, head = FAMILIES[name].is_tied(config), "lm_head.weight"
    assert tied != (head in headers)
    if tied:
        verify_weights(
            {**headers, head: headers["model.embed_tokens.weight"]}, shape_from_config(config), "here", config
        )
        return
    del headers[head]
    with pytest.raises(ConfigError, match="no tensor 'lm_head.weight'"):
        verify_weights(headers, shape_from_config(config), "here", config)
