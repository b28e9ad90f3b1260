"""Gates: every transform preserves the function of every family, online where it cannot be folded, and
a mistake in either is refused by name and figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import family_table
from family_cases import QUICK, SUBSTITUTE, FamilyModel, can_be_online, primitives
from quantgrid.calibration.streaming import FullPrecision
from quantgrid.config.registry import TRANSFORMS
from quantgrid.evaluation import gates
from quantgrid.evaluation.gates import DIVERGENCE, LOGITS, check_model, check_transform
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.inference.transform import Transform
from quantgrid.models.families import FAMILIES
from quantgrid.quantization.sequential import RunningLayer
from selection import others_slow

# the families by what is around their linears
BOTH_NORMS = ("Glm4ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
ONLY_BEHIND = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM")
# transforms that rotate the stream, and that divide the inputs behind it
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
DIVIDE = (
    "scaling",
    "awq",
    "outlier_suppression_plus",
    "duquant",
    "rotation_then_scaling",
    "optimized_scaling",
    "optimized_rotation_scaling",
    "flatquant",
)


# transforms that divide the input of down, and families with an activation there that no factor passes
DIVIDE_DOWN = (
    "scaling",
    "awq",
    "outlier_suppression_plus",
    "duquant",
    "optimized_rotation_scaling",
    "flatquant",
)
# families with a gate behind their attention, which no rotation of the values passes
GATED = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
CURVED = ("GptOssForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "PhiForCausalLM", "Starcoder2ForCausalLM")


def is_refused(family: str, transform: str) -> bool:
    """Whether a transform has to be refused on a family unless it runs online."""
    return (
        (transform in ROTATE and family in BOTH_NORMS + ONLY_BEHIND + GATED)
        or (transform in DIVIDE and family in ONLY_BEHIND)
        or (transform in DIVIDE_DOWN and family in CURVED)
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("family", others_slow(FAMILIES, QUICK.__contains__))
def test_every_transform_is_exact_or_refused(family, transform, family_model):
    """Offline, and with every primitive online that can be."""
    made = family_model(family)
    for online in (False, True) if any(map(can_be_online, primitives(transform))) else (False,):
        if is_refused(family, transform) and not online:
            with pytest.raises(ConfigError, match=SUBSTITUTE):
                made.transform_gate(transform, online)
        else:
            assert made.transform_gate(transform, online).within(LOGITS, DIVERGENCE), online


@pytest.mark.parametrize("name", ["scaling", "quarot"])
def test_a_transform_that_passes_is_reported_with_its_figures(name, family_model):
    made = family_model("GraniteForCausalLM")
    found = check_transform("tiny", name, made.decoder, made.fitted(name), made.tokens)
    assert 0 < found["logits"] < LOGITS and 0 <= found["divergence"] < DIVERGENCE and "noise" not in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_fails_by_itself(value, tmp_path):
    """Its cells are failed results with that reason; neither gate stops the run for it."""
    made = FamilyModel.make("LlamaForCausalLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalFailure, match="(holds|are) NaN or inf"):
        check_model("tiny", made.folder, made.tokens)
    with pytest.raises(NumericalFailure, match="(holds|are) NaN or inf"):
        check_transform("tiny", "none", made.decoder, Transform([]), made.tokens)


# -- faults of the model ---------------------------------------------------------------------------

MODEL_REFUSED = r"models\.tiny: .*largest error of a logit [1-9]\.\d\de[+-]\d\d standard deviations"
Damage = Callable[[nn.Module], Any]


def noisy_gain(layer: nn.Module) -> None:
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    layer.input_layernorm.weight.data.mul_(1 + 0.01 * noise)


def larger_output(layer: nn.Module) -> None:
    layer.self_attn.o_proj.weight.data.mul_(1.001)


def larger_epsilon(layer: nn.Module) -> None:
    """At the first norm, whose input is small: elsewhere 1e-5 in place of 1e-6 is no difference."""
    norm = next(module for name, module in layer.named_children() if name.endswith("_layernorm"))
    norm.variance_epsilon *= 10


# a norm behind it undoes the factor of an output
DAMAGED = [
    ("LlamaForCausalLM", noisy_gain),
    ("LlamaForCausalLM", larger_output),
    ("LlamaForCausalLM", larger_epsilon),
    ("Gemma3ForCausalLM", noisy_gain),
    ("Olmo2ForCausalLM", larger_epsilon),
]


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_a_damaged_layer_is_caught_by_the_model_gate(name, damage, family_model, monkeypatch):
    made, fill = family_model(name), FullPrecision.fill

    def filled(self: FullPrecision, index: int, layer: nn.Module) -> None:
        fill(self, index, layer)
        if index == 0:
            damage(layer)

    monkeypatch.setattr(FullPrecision, "fill", filled)
    with pytest.raises(ConfigError, match=MODEL_REFUSED):
        check_model("tiny", made.folder, made.tokens)


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_a_damaged_layer_is_caught_by_the_transform_gate(name, damage, family_model, monkeypatch):
    made = family_model(name)

    class Damaged(RunningLayer):
        def __init__(self, module: nn.Module, layer: Any, *more: Any):
            super().__init__(module, layer, *more)
            if layer.index == 0:
                damage(module)

    monkeypatch.setattr(gates, "RunningLayer", Damaged)
    refused_by_transform_gate(made, "none")


JOINED = FAMILIES["Phi3ForCausalLM"].joined


def refused_by_transform_gate(made: FamilyModel, transform: str) -> None:
    message = rf"transforms\.{transform} changes the function of tiny .*largest error of a logit [1-9]\.\d\de"
    with pytest.raises(ConfigError, match=message):
        check_transform("tiny", transform, made.decoder, made.fitted(transform), made.tokens)


# -- faults of the data ----------------------------------------------------------------------------

# what the model gate sees: it compares with transformers' arithmetic
WRONG_FOR_THE_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "scale of the logits": ("GraniteForCausalLM", {"logits": {}}),
    "product for a quotient": ("GraniteForCausalLM", {"logits": {"multiply": "logits_scaling"}}),
    "softcap of the logits": ("Gemma2ForCausalLM", {"logits": {}}),
    "a norm without its bias": ("Starcoder2ForCausalLM", {"norm_bias": False}),
    "half an offset": ("Gemma3ForCausalLM", {"gain_offset": 0.5}),
}
# what it cannot see, since streaming runs transformers' modules: a transform that relies on it shows it
WRONG_FOR_A_TRANSFORM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gains less one": ("GemmaForCausalLM", "fold_norms", {"gain_offset": 0.0}),
    "post-norms for pre-norms": (
        "Olmo2ForCausalLM",
        "random_hadamard",
        {
            "attention_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
            "post_attention_norm": None,
            "post_mlp_norm": None,
        },
    ),
    "a post-norm for a pre-norm": (
        "Gemma3ForCausalLM",
        "fold_norms",
        {"mlp_norm": "post_attention_layernorm", "post_attention_norm": "pre_feedforward_layernorm"},
    ),
    "gate for up": ("Phi3ForCausalLM", "scaling", {"joined": {**JOINED, "mlp.gate_up_proj": ("up", "gate")}}),
    "LayerNorm for RMSNorm": ("OPTForCausalLM", "random_hadamard", {"centered": False}),
    "keys before values": ("DeepseekV2ForCausalLM", "random_hadamard", {"by_head": False}),
    "blocks for heads": ("GPTNeoXForCausalLM", "random_hadamard", {"by_head": False}),
    "a factor through GELU": ("GPTNeoXForCausalLM", "scaling", {"degree": 1}),
    "a factor through a square": ("NemotronForCausalLM", "scaling", {"degree": 1}),
    "keys for values": ("Phi3ForCausalLM", "shifting", {"joined": {**JOINED, "self_attn.qkv_proj": ("q", "v", "k")}}),
}


def made_wrongly(name: str, changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> FamilyModel:
    """Model of a family, read with the family's data changed."""
    made = FamilyModel.make(name, folder / "model")
    check_model("tiny", made.folder, made.tokens)
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], **changes))
    return made


@pytest.mark.parametrize("fault", WRONG_FOR_THE_MODEL)
def test_wrong_data_of_a_family_are_caught_by_the_model_gate(fault, tmp_path, monkeypatch):
    name, changes = WRONG_FOR_THE_MODEL[fault]
    made = made_wrongly(name, changes, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=MODEL_REFUSED):
        check_model("tiny", made.folder, made.tokens)


@pytest.mark.parametrize("fault", WRONG_FOR_A_TRANSFORM)
def test_wrong_data_of_a_family_are_caught_by_the_transform_gate(fault, tmp_path, monkeypatch):
    name, transform, changes = WRONG_FOR_A_TRANSFORM[fault]
    refused_by_transform_gate(made_wrongly(name, changes, tmp_path, monkeypatch), transform)


@pytest.mark.slow
def test_a_setting_that_no_plan_knows_is_caught_by_the_transform_gate(tmp_path):
    """Clamped values cannot be rotated between v and o; the model itself runs as it should."""
    made = FamilyModel.make("OlmoeForCausalLM", tmp_path / "model", clip_qkv=0.5)
    check_model("tiny", made.folder, made.tokens)
    refused_by_transform_gate(made, "random_hadamard")


# -- the published table ---------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_published_table_says_what_is_measured(family_model):
    """Its figures may differ: they are noise of float32 arithmetic."""
    found = family_table.document(family_model)
    assert family_table.without_figures(family_table.DOCUMENT.read_text()) == family_table.without_figures(found)
    assert all(word in found for word in ("| exact, ", "| exact online, "))
