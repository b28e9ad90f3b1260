"""Quantized mixtures of experts: a checkpoint runs streamed as whole and as transformers' own model, and its
summary counts the tokens of experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from family_models import build, calibrate, some_tokens
from learned_cases import EXPERTS, QUICK_EXPERTS, SPARSE, Given
from quantgrid.calibration.experts import expert_tokens
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.streaming import streamed
from quantgrid.evaluation.perplexity import final_states
from quantgrid.inference.transform import fit
from quantgrid.machine import devices
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.sparse_outliers import sparse_outliers
from quantgrid.mitigations.methods.tune_scales import tune_scales
from quantgrid.models.canonical import GainNorm, Joined, family_of
from quantgrid.models.lm_head import head_of
from quantgrid.models.plans import SITES
from quantgrid.quantization.cached import Quantized, Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import PackedCheckpoint, load_quantized, save_quantized
from quantgrid.quantization.grouping import batches
from quantgrid.quantization.sequential import Sequential, quantize_sequentially
from quantgrid.reporting.style import METRICS
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.primitives.rotate import RotateDown, RotateHeads
from quantgrid.transforms.primitives.shift import Shift
from selection import others_slow

WEIGHTS = CellSchemes(scheme("int4"))
ACTIVATIONS = CellSchemes(scheme("int4"), {site: [activation_scheme("int4")] for site in SITES})
MITIGATIONS = {
    "rtn": rtn,
    "gptq": gptq,
    "low_rank": partial(low_rank, rank=3, metric="qera_exact"),
    "gptq_low_rank": partial(gptq_low_rank, rank=3),
    "sparse_outliers": partial(sparse_outliers, rank=3, base="gptq"),
    "sequential": None,
}
TRANSFORMS: dict[str, list[Any]] = {
    "none": [],
    "online": [
        Shift("median", ["attention_input", "mlp_input", "output_input"]),
        RotateHeads(1, online=True),
        RotateDown(),
    ],
}
METRICS_OF_EXPERTS = ["expert_tokens_smallest", "expert_tokens_median", "experts_below_width"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    made: dict[str, Given] = {}

    def of(architecture: str) -> Given:
        if architecture not in made:
            made[architecture] = Given.make(tmp_path_factory.mktemp("experts"), architecture)
        return made[architecture]

    return of


def quantized(made: Given, mitigation: str, schemes: CellSchemes, transform: str = "none") -> Quantized:
    """Quantized model with the mitigation of this name; ``sequential`` is GPTQ on quantized predecessors."""
    statistics = str(made.folder / "statistics")
    fitted = fit(TRANSFORMS[transform], made.decoder, statistics)
    recipe = Recipe(fitted, schemes, MITIGATIONS[mitigation] or gptq, statistics)
    if mitigation != "sequential":
        return quantize_decoder(made.decoder, recipe)
    return quantize_sequentially(
        made.decoder, recipe, Sequential(made.tokens, quantized_activations=bool(schemes.activation))
    )


def saved(done: Quantized, folder: Path) -> Path:
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", {})
    return folder


@torch.no_grad()
def streamed_logits(folder: Path, tokens: Tensor) -> Tensor:
    model = streamed(PackedCheckpoint(folder))
    return head_of(model)(final_states(model, tokens, len(tokens)))


@pytest.mark.parametrize(
    "architecture, transform, mitigation",
    others_slow(
        [(name, transform, mitigation) for name in EXPERTS for transform in TRANSFORMS for mitigation in MITIGATIONS],
        lambda name, transform, mitigation: name == SPARSE and transform == "online" and mitigation != "low_rank",
    ),
)
@torch.no_grad()
def test_a_checkpoint_runs_streamed_as_whole(architecture, transform, mitigation, given, tmp_path):
    made = given(architecture)
    folder = saved(quantized(made, mitigation, ACTIVATIONS, transform), tmp_path)
    tokens, wanted = made.tokens[:2], made.logits
    found = streamed_logits(folder, tokens)
    assert torch.equal(found, load_quantized(folder)(tokens, use_cache=False).logits)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert 1e-3 < error < 1.2


def effective(linear: nn.Module) -> Tensor:
    """Weight of a quantized linear with its low-rank term."""
    return linear.weight if linear.left is None else linear.weight + linear.left @ linear.right


def stacked(expert: nn.Module, name: str, by_row: bool) -> Tensor:
    """Part of an expert as transformers' tensor ``name`` of all experts holds it; ``by_row``: transposed,
    with rows of gate and up in turn."""
    linears = [expert.gate_proj, expert.up_proj] if name.startswith("gate_up") else [expert.down_proj]
    parts = [linear.bias if name.endswith("bias") else effective(linear) for linear in linears]
    found = torch.stack(parts, 1).flatten(0, 1) if by_row else torch.cat(parts)
    return found.mT if by_row and found.dim() == 2 else found


def own_model(made: Given, whole: nn.Module) -> nn.Module:
    """transformers' own model with the weights that ``whole`` computes with; those of experts are stacked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**{**made.config, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    by_row = type(model).__name__ == "GptOssForCausalLM"
    held = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    for name, parameter in [*model.named_parameters(), *held.items()]:
        path, _, last = name.rpartition(".")
        if path.endswith(".experts"):
            value = torch.stack([stacked(one, last, by_row) for one in whole.get_submodule(path)])
        else:
            module = whole.get_submodule(path)
            if isinstance(module, Joined):
                parts = [effective(part).unflatten(0, (module.heads, -1)) for part in module.values()]
                value = torch.cat(parts, 1).flatten(0, 1)
            else:
                value = effective(module) if last == "weight" and hasattr(module, "left") else getattr(module, last)
                value = value - family_of(model).gain_offset if isinstance(module, GainNorm) else value
        parameter.data = value.clone()
    return model


@pytest.mark.parametrize(
    "architecture, mitigation",
    others_slow(
        [(name, mitigation) for name in EXPERTS for mitigation in MITIGATIONS],
        lambda name, mitigation: (
            (mitigation == "gptq" and name in QUICK_EXPERTS) or (name == SPARSE and mitigation == "gptq_low_rank")
        ),
    ),
)
@torch.no_grad()
def test_rounded_weights_in_transformers_own_model_give_its_logits(architecture, mitigation, given, tmp_path):
    made = given(architecture)
    whole = load_quantized(saved(quantized(made, mitigation, WEIGHTS), tmp_path))
    found = whole(made.tokens[:2], use_cache=False).logits
    wanted = own_model(made, whole)(made.tokens[:2], use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
    assert (wanted - made.logits).abs().max() > 1e-2 * wanted.std()


def test_experts_solved_together_are_those_solved_alone(given, monkeypatch):
    made = given(SPARSE)
    together = quantized(made, "gptq", ACTIVATIONS)
    monkeypatch.setattr(devices, "LARGE", 1)
    assert len(batches(made.decoder.shape, range(1), 1)) == 3 * 7 + 4
    alone = quantized(made, "gptq", ACTIVATIONS)
    assert (
        together.content.tensors.keys() == alone.content.tensors.keys()
        and together.errors.keys() == alone.errors.keys()
    )
    differing = sum(
        int((tensor != alone.content.tensors[name]).sum()) for name, tensor in together.content.tensors.items()
    )
    assert differing <= 1e-3 * sum(tensor.numel() for tensor in together.content.tensors.values())


# -- tokens of experts in the summary --------------------------------------------------------------


@pytest.mark.parametrize("mitigation", ["rtn", "sequential", "trained"])
def test_the_summary_counts_the_tokens_of_experts(mitigation, given):
    made = given(SPARSE)
    if mitigation == "trained":
        recipe = Recipe(fit([], made.decoder, None), WEIGHTS, None, str(made.folder / "statistics"))
        options = {"base": "rtn", "error": "squared", "steps": 0, "batch_size": 2, "schedule": "cosine"}
        more = {"learning_rate": 1e-3, "held_out": 16, "gradient": "range"}
        done = tune_scales(recipe, made.context(), 0, **options, **more).quantized
    else:
        done = quantized(made, mitigation, WEIGHTS)
    wanted = expert_tokens(made.decoder.shape, made.folder / "statistics")
    assert list(wanted) == METRICS_OF_EXPERTS and {*wanted} <= {*METRICS}
    assert {name: done.summary()[name] for name in wanted} == wanted
    assert 0 < wanted["expert_tokens_smallest"] < wanted["expert_tokens_median"]


def test_a_dense_model_has_no_tokens_of_experts(tmp_path):
    folder = build("LlamaForCausalLM", tmp_path / "model")
    path = calibrate(folder, tmp_path / "statistics", some_tokens(4, 16))
    decoder = DecoderFolder(folder)
    done = quantize_decoder(decoder, Recipe(fit([], decoder, None), WEIGHTS, rtn, str(path)))
    assert not {*METRICS_OF_EXPERTS} & {*done.summary()}
