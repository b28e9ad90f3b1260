"""Multimodal checkpoints are quantized as their text decoder: same logits as transformers' own multimodal
model, same checkpoint as the decoder saved alone, everything of the vision tower left out by name."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from family_models import LINEAR, SIZES, disturb, some_tokens
from input_cases import TINY, edit_json
from learned_cases import schemes
from quantgrid.calibration.collect import collect
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.statistics import to_tensors
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.corpora.tokenization import require_known
from quantgrid.evaluation.gates import Agreement, check_model, own_logits, streamed_logits, transformed_logits
from quantgrid.ground.errors import ConfigError, UnsupportedModel
from quantgrid.ground.storage import read_json, write_json, write_tensors
from quantgrid.inference.transform import Transform, fit
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.fetch import fetch
from quantgrid.models.folders import check_folder, shape_of
from quantgrid.models.multimodal import LAYOUTS, PREFIX, STACKED
from quantgrid.models.positions import positions_in
from quantgrid.models.shapes import shape_from_folder
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_quantized, save_quantized
from quantgrid.transforms.recipes import random_hadamard

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
# name -> multimodal model type, text decoder, its settings, settings of the whole
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        "Gemma3ForCausalLM",
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 24, "sliding_window": 8},
        {"mm_tokens_per_image": 4, "image_token_index": 60, "vision_config": {"model_type": "siglip_vision_model"}},
    ),
    "mistral3": (
        "mistral3",
        "MistralForCausalLM",
        {"model_type": "mistral", "sliding_window": 8},
        {"tie_word_embeddings": False, "image_token_index": 60, "vision_config": {"model_type": "pixtral"}},
    ),
    "ministral3": (
        "mistral3",
        "Ministral3ForCausalLM",
        {"model_type": "ministral3"},
        {"image_token_index": 60, "vision_config": {"model_type": "pixtral"}},
    ),
    "qwen3_5": (
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        {"model_type": "qwen3_5_text", **LINEAR},
        {
            "tie_word_embeddings": False,
            "image_token_id": 60,
            "vision_config": {"model_type": "qwen3_5_vision", "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
}


@dataclass(frozen=True)
class Multimodal:
    """A tiny multimodal model in ``folder/source``, its text decoder alone in ``folder/alone``."""

    name: str
    folder: Path

    @classmethod
    def make(cls, name: str, folder: Path) -> Multimodal:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        model_type, architecture, text, whole = MODELS[name]
        sizes = {**SIZES, **text, "tie_word_embeddings": whole.get("tie_word_embeddings", True)}
        config = AutoConfig.for_model(
            model_type, **{**whole, "text_config": sizes, "vision_config": {**VISION, **whole["vision_config"]}}
        )
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        disturb(model)
        model.save_pretrained(folder / "source")
        alone = AutoModelForCausalLM.from_config(model.config.text_config, dtype=torch.float32)
        assert type(alone).__name__ == architecture
        alone.model.load_state_dict(model.model.language_model.state_dict())
        alone.lm_head.load_state_dict(model.lm_head.state_dict())
        alone.save_pretrained(folder / "alone")
        shutil.copy(TINY / "tokenizer.json", folder / "source")
        shutil.copy(TINY / "tokenizer.json", folder / "alone")
        return cls(name, folder)

    @cached_property
    def tokens(self) -> Tensor:
        return some_tokens()

    @cached_property
    def logits(self) -> Tensor:
        """Of transformers' multimodal model, on text."""
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(self.folder / "source", dtype=torch.float32).eval()
        with torch.no_grad():
            return model(self.tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Multimodal]:
    return {name: Multimodal.make(name, tmp_path_factory.mktemp(name)) for name in MODELS}


def fetched(source: Path, folder: Path) -> Path:
    fetch({"source": "local", "path": str(source)}, folder)
    return folder


def renamed(source: Path, folder: Path, prefix: str) -> Path:
    """A copy of a multimodal model with the names of a layout, as other versions of transformers write it."""
    shutil.copytree(source, folder)
    state, found = load_file(folder / "model.safetensors"), {}
    for name, tensor in state.items():
        own = next((written for written in LAYOUTS if name.startswith(written)), None)
        if name.endswith("lm_head.weight"):
            found[LAYOUTS[prefix].lm_head] = tensor
        elif own is not None:
            found[prefix + name.removeprefix(own)] = tensor
        else:
            found[("model." if prefix.startswith("model.") else "") + name.removeprefix("model.")] = tensor
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_text_decoder_has_the_logits_of_the_multimodal_model(models, name, prefix, tmp_path):
    made = models[name]
    folder = fetched(renamed(made.folder / "source", tmp_path / "source", prefix), tmp_path / "fetched")
    assert read_json(folder / "config.json")[PREFIX] == prefix
    assert torch.equal(streamed_logits(folder, made.tokens), made.logits)
    assert torch.equal(own_logits(folder, made.tokens), made.logits)
    assert check_model("tiny", folder, made.tokens, layers=1)["logits"] == 0


def test_a_decoder_saved_alone_may_keep_the_names_of_the_whole(models, tmp_path):
    """As transformers saves the decoder of a Qwen3.5 that it read from a multimodal checkpoint."""
    from transformers import AutoModelForCausalLM

    made = models["qwen3_5"]
    AutoModelForCausalLM.from_pretrained(made.folder / "source", dtype=torch.float32).save_pretrained(
        tmp_path / "saved"
    )
    shutil.copy(TINY / "tokenizer.json", tmp_path / "saved")
    assert any(name.startswith("model.language_model.") for name in load_file(tmp_path / "saved/model.safetensors"))
    folder = fetched(tmp_path / "saved", tmp_path / "fetched")
    assert torch.equal(streamed_logits(folder, made.tokens), made.logits)
    assert torch.equal(own_logits(folder, made.tokens), made.logits)


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
def test_experts_may_be_in_one_tensor_of_the_files(prefix, family_model, tmp_path):
    """As in the published files of Qwen3.5-MoE, whose config.json has no size of an MLP."""
    made, name = family_model("Qwen3_5MoeForCausalLM"), "model.layers.{}.mlp.experts."
    source = Path(shutil.copytree(made.folder, tmp_path / "source"))
    shutil.copy(TINY / "tokenizer.json", source)
    held = load_file(source / "model.safetensors")
    for layer in range(2):
        experts = [
            [held.pop(f"{name.format(layer)}{expert}.{linear}_proj.weight") for linear in ("gate", "up", "down")]
            for expert in range(6)
        ]
        held[f"{name.format(layer)}gate_up_proj"] = torch.stack([torch.cat(expert[:2]) for expert in experts])
        held[f"{name.format(layer)}down_proj"] = torch.stack([expert[2] for expert in experts])
    named = {key.replace("model.", prefix, 1) if prefix and key != "lm_head.weight" else key: held[key] for key in held}
    save_file(named, source / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in read_json(source / "config.json").items() if key != "intermediate_size"}
    write_json(source / "config.json", config)
    assert check_folder(source).stacked_experts
    folder = fetched(source, tmp_path / "fetched")
    assert read_json(folder / "config.json")[STACKED] is True and STACKED not in DecoderFolder(folder).config
    assert torch.equal(streamed_logits(folder, made.tokens), made.logits)
    assert Agreement.of(own_logits(folder, made.tokens), made.logits, made.tokens).within(1e-4, 1e-9)
    again = fetched(folder, tmp_path / "again")
    assert read_json(again / "config.json") == read_json(folder / "config.json")


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_is_described_as_if_it_were_alone(models, name, tmp_path):
    made = models[name]
    source, folder = made.folder / "source", fetched(made.folder / "source", tmp_path / "fetched")
    alone = fetched(made.folder / "alone", tmp_path / "alone")
    shape = shape_of({"source": "local", "path": str(source)})
    assert shape == check_folder(source) == shape_from_folder(source)
    assert shape == shape_from_folder(folder) == DecoderFolder(folder).shape == shape_from_folder(alone)
    assert shape.architecture == MODELS[name][1] and positions_in(source) == 128
    config = read_json(folder / "config.json")
    assert not {"text_config", "vision_config"} & config.keys()
    assert {key: value for key, value in config.items() if key != PREFIX} == read_json(alone / "config.json")
    assert PREFIX not in DecoderFolder(folder).config
    again = fetched(folder, tmp_path / "again")
    assert read_json(again / "config.json") == config


@pytest.mark.parametrize("name", MODELS)
def test_a_transform_and_rounding_see_the_decoder_alone(models, name, tmp_path):
    made = models[name]
    decoders = {
        kind: DecoderFolder(fetched(made.folder / kind, tmp_path / f"{kind}-fetched")) for kind in ("source", "alone")
    }
    online = "online" if decoders["source"].shape.plan(0).post_norms else "offline"
    transform = fit(random_hadamard.primitives(1, residual=online, values="online"), decoders["source"], None)
    found = transformed_logits(decoders["source"], transform, made.tokens)
    assert Agreement.of(found, made.logits, made.tokens).within(1e-4, 1e-9)
    packed = {}
    for kind, decoder in decoders.items():
        place = tmp_path / f"{kind}-checkpoint"
        place.mkdir()
        statistics = collect(streamed(FullPrecision(decoder.folder)), made.tokens, samples=16)
        tensors = dict(entry for site in statistics.items() for entry in to_tensors(*site).items())
        write_tensors(place / "statistics", tensors, {})
        quantized = quantize_decoder(decoder, Recipe(transform, schemes(), rtn, str(place / "statistics")))
        save_quantized(quantized.content, place / "model.safetensors", place / "quantgrid.json", {})
        packed[kind] = load_file(place / "model.safetensors")
        with torch.no_grad():
            logits = load_quantized(place)(made.tokens, use_cache=False).logits
        assert 0.01 < Agreement.of(logits, made.logits, made.tokens).logits < 20
    assert packed["source"].keys() == packed["alone"].keys()
    assert all(torch.equal(tensor, packed["alone"][key]) for key, tensor in packed["source"].items())


def test_keys_that_a_text_config_leaves_out_take_the_defaults_of_the_decoder(models, tmp_path):
    """The hub's Gemma 3 names neither heads nor vocabulary; both are needed before transformers runs."""
    shutil.copytree(models["gemma3"].folder / "source", tmp_path / "source")
    text = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = {"text_config": {"model_type": "gemma3_text", **text}, "tie_word_embeddings": True}
    edit_json(tmp_path / "source" / "config.json", **config)
    shape = shape_from_folder(tmp_path / "source")
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary) == (8, 4, 256, 262208)


def test_the_vocabulary_is_in_the_canonical_config(models, tmp_path):
    folder = fetched(models["mistral3"].folder / "source", tmp_path / "fetched")
    require_known([60], None, folder, "corpus")


def test_a_stored_lm_head_is_not_the_embedding(models, tmp_path):
    """As in transformers: a config.json may say nothing and mean tied."""
    source = Path(shutil.copytree(models["mistral3"].folder / "source", tmp_path / "source"))
    edit_json(source / "config.json", tie_word_embeddings=True)
    folder = fetched(source, tmp_path / "fetched")
    assert read_json(folder / "config.json")["tie_word_embeddings"] is False
    assert torch.equal(streamed_logits(folder, models["mistral3"].tokens), models["mistral3"].logits)


def without(name: str):
    return lambda folder: changed(folder, lambda held: held.pop(name))


def with_one(name: str):
    return lambda folder: changed(folder, lambda held: held.update({name: torch.ones(64)}))


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def config(**changes: Any):
    return lambda folder: edit_json(folder / "config.json", **changes)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor of a layer": (
        without("language_model.model.layers.1.self_attn.q_proj.weight"),
        ConfigError,
        "no tensor 'language_model.model.layers.1.self_attn.q_proj.weight', which Gemma3ForCausalLM needs",
    ),
    "a norm too many": (
        with_one("language_model.model.layers.0.self_attn.v_norm.weight"),
        ConfigError,
        "hold 'language_model.model.layers.0.self_attn.v_norm.weight', which Gemma3ForCausalLM",
    ),
    "an unknown tower": (with_one("audio_tower.norm.weight"), ConfigError, "hold 'audio_tower.norm.weight', which"),
    "a layer of the decoder alone": (
        with_one("model.layers.0.input_layernorm.weight"),
        ConfigError,
        "hold 'model.layers.0.input_layernorm.weight', which",
    ),
    "text_config missing": (config(text_config=None), ConfigError, "needs its text decoder under 'text_config'"),
    "text_config a list": (config(text_config=[1]), ConfigError, r"under 'text_config', got \[1\]"),
    "another decoder": (
        config(text_config={**SIZES, "model_type": "bloom"}),
        UnsupportedModel,
        "'bloom' has attention outside of transformers' interface, .* cannot be rounded, not supported yet",
    ),
    "decoder by number": (config(text_config={**SIZES, "model_type": 3}), ConfigError, "'model_type' a name"),
    "size of the decoder as text": (
        config(text_config={**SIZES, "model_type": "gemma3_text", "hidden_size": "64"}),
        ConfigError,
        "hidden_size: '64' is not a whole number",
    ),
    "quantized as a whole": (config(quantization_config={"quant_method": "awq"}), ConfigError, "quantized .awq"),
    "another wrapper": (
        config(architectures=["LlavaForConditionalGeneration"], model_type="llava"),
        UnsupportedModel,
        "unknown architecture 'LlavaForConditionalGeneration'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_as_the_files_name_it(models, case, tmp_path):
    spoil, kind, message = BAD[case]
    folder = Path(shutil.copytree(models["gemma3"].folder / "source", tmp_path / "source"))
    check_folder(folder)
    spoil(folder)
    with pytest.raises(kind, match=message) as refused:
        check_folder(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1400


def test_a_prefix_that_no_layout_has_is_refused(models, tmp_path):
    folder = fetched(models["gemma3"].folder / "source", tmp_path / "fetched")
    edit_json(folder / "config.json", **{PREFIX: "decoder."})
    with pytest.raises(ConfigError, match=re.escape(f"{PREFIX}: unknown prefix 'decoder.'")):
        DecoderFolder(folder)


def test_nothing_is_transformed_by_an_empty_transform(models, tmp_path):
    folder = fetched(models["gemma3"].folder / "source", tmp_path / "fetched")
    found = transformed_logits(DecoderFolder(folder), Transform([]), models["gemma3"].tokens)
    assert Agreement.of(found, models["gemma3"].logits, models["gemma3"].tokens).within(1e-4, 1e-9)
