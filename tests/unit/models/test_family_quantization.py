"""Quantized models of every family: what is loaded from a checkpoint computes as transformers' own model
with the rounded weights in their places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from family_cases import DENSE, QUICK, FamilyModel
from quantgrid.calibration.streaming import streamed
from quantgrid.evaluation.gates import Agreement
from quantgrid.evaluation.perplexity import final_states
from quantgrid.inference.transform import Transform, layer_state
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.families import FAMILIES
from quantgrid.models.lm_head import head_of
from quantgrid.models.plans import Stored
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import PackedCheckpoint, load_quantized, save_quantized
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from selection import others_slow

ALL = others_slow(DENSE, QUICK.__contains__)
ROUNDED = 2e-5  # largest error of a logit, in standard deviations: float32 noise


def written(made: FamilyModel, schemes: CellSchemes, mitigation, folder: Path, transform: Transform) -> Path:
    """Checkpoint of the quantized model."""
    done = quantize_decoder(made.decoder, Recipe(transform, schemes, mitigation, str(made.statistics)))
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
    return folder


def schemes_of(preset: str, granularity: str = "channel") -> CellSchemes:
    return CellSchemes.from_dict(cell_schemes({"preset": preset}, granularity, "test", 16))


def own_model(folder: Path) -> nn.Module:
    """transformers' own model with embedding and lm_head as a checkpoint keeps them, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for end in {model.get_input_embeddings(), model.get_output_embeddings()}:
        end.weight.data = end.weight.data.bfloat16().float()
    return model


def layers_of(model: nn.Module, name: str) -> nn.ModuleList:
    """Decoder layers of transformers' own model."""
    return model.get_submodule(FAMILIES[name].in_files("model.layers"))


def weights(layer: nn.Module, made: FamilyModel, index: int) -> dict[str, Tensor]:
    """Linear -> view of its weight (*rows, n) in transformers' layer ``index``."""
    shape, found, ends = made.decoder.shape, {}, {}
    plan, family = shape.plan(index), shape.family
    for linear in plan.linears:
        tensor = plan.tensors[linear]
        place = plan.stored.get(tensor, Stored(tensor))
        whole = layer.get_parameter(place.name).data
        whole = whole.mT if family.transposed else whole
        if place.parts and family.by_head:
            found[linear] = whole.unflatten(0, (shape.heads, 3, -1))[:, place.parts.index(linear)]
            continue
        start = ends.get(place.name, 0)
        ends[place.name] = start + shape.linear_size(linear)[0]
        found[linear] = whole[start : ends[place.name]]
    read = [plan.modules[reader] for reader in plan.readers]
    held = [module.weight for path, module in layer.named_modules() if hasattr(module, "weight") and path not in read]
    assert sum(map(Tensor.numel, found.values())) == sum(one.numel() for one in held if one.dim() == 2)  # no row twice
    return found


@torch.no_grad()
def agreement(found: nn.Module, wanted: Tensor, tokens: Tensor) -> Agreement:
    return Agreement.of(found(tokens, use_cache=False).logits, wanted, tokens)


@pytest.mark.parametrize("preset, granularity", [("w4a16", "channel"), ("w4a16", "group-16"), ("nf4", "channel")])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rounded_weights_run_as_in_transformers_own_model(name, preset, granularity, family_model, tmp_path):
    """Rounded here in the tensors of the file."""
    made, schemes = family_model(name), schemes_of(preset, granularity)
    model = own_model(made.folder)
    for index, layer in enumerate(layers_of(model, name)):
        for weight in weights(layer, made, index).values():
            rounded = fake_quantize(weight.reshape(-1, weight.shape[-1]), schemes.weight)
            weight.copy_(rounded.view(weight.shape))
    loaded = load_quantized(written(made, schemes, rtn, tmp_path, Transform()))
    wanted = model(made.tokens, use_cache=False).logits
    assert agreement(loaded, wanted, made.tokens).logits < ROUNDED
    assert Agreement.of(wanted, made.logits, made.tokens).logits > 0.05  # rounding counts


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_gptq_runs_as_in_transformers_own_model(name, family_model, tmp_path):
    """Each linear is solved here by itself, on the second moment of its site."""
    made, wanted_scheme = family_model(name), scheme("int4")
    model = own_model(made.folder)
    for index, layer in enumerate(layers_of(model, name)):
        state = layer_state(made.decoder, index, str(made.statistics))
        for linear, weight in weights(layer, made, index).items():
            site = state.statistics[state.plan.site_of[linear]]
            solved = gptq(weight.reshape(-1, weight.shape[-1]), site, wanted_scheme)
            weight.copy_(solved.weight().view(weight.shape))
    folder = written(made, CellSchemes(weight=wanted_scheme), gptq, tmp_path, Transform())
    wanted = model(made.tokens, use_cache=False).logits
    assert agreement(load_quantized(folder), wanted, made.tokens).logits < ROUNDED
    nearest = load_quantized(written(made, CellSchemes(weight=wanted_scheme), rtn, tmp_path / "rtn", Transform()))
    assert agreement(nearest, wanted, made.tokens).logits > 0.05  # GPTQ chose other codes


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_layers_loaded_one_by_one_compute_as_the_whole_model(name, family_model, tmp_path):
    """With rounded weights, inputs, keys and values, and online operations."""
    made = family_model(name)
    entry = {"preset": "int4", "key_value": {"element": "int8"}}
    schemes = CellSchemes.from_dict(cell_schemes(entry, "channel", "test", 16))
    folder = written(made, schemes, rtn, tmp_path, made.fitted("random_hadamard", online=True))
    whole, layers = load_quantized(folder), streamed(PackedCheckpoint(folder))
    found = head_of(layers)(final_states(layers, made.tokens, len(made.tokens)))
    assert torch.equal(found, whole(made.tokens, use_cache=False).logits)
    assert Agreement.of(found, made.logits, made.tokens).logits > 0.05
