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
from quantgrid.models.plans import LINEARS, Stored
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


def places(layer: nn.Module, name: str) -> dict[str, tuple[nn.Parameter, slice]]:
    """Linear -> its weight in transformers' layer, and its rows there."""
    plan, found, ends = FAMILIES[name].plan, {}, {}
    for linear in LINEARS:
        tensor = plan.tensors[linear]
        place = plan.stored.get(tensor, Stored(tensor))
        start = ends.get(place.name, 0)
        rows = {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 96, "up": 96, "down": 64}[linear]
        ends[place.name] = start + rows
        found[linear] = layer.get_parameter(place.name), slice(start, start + rows)
    assert sum(rows.stop - rows.start for _, rows in found.values()) == 448  # no row twice
    return found


@torch.no_grad()
def agreement(found: nn.Module, wanted: Tensor, tokens: Tensor) -> Agreement:
    return Agreement.of(found(tokens, use_cache=False).logits, wanted, tokens)


@pytest.mark.parametrize("preset, granularity", [("w4a16", "channel"), ("w4a16", "group-16"), ("nf4", "channel")])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rounded_weights_run_as_in_transformers_own_model(name, preset, granularity, family_model, tmp_path):
    """Rounded here by one call on the tensors of the file, whole where the linears are joined: a row has
    separate scales."""
    made, schemes = family_model(name), schemes_of(preset, granularity)
    model = own_model(made.folder)
    for layer in model.model.layers:
        for weight in {weight for weight, _ in places(layer, name).values()}:
            weight.data = fake_quantize(weight.data, schemes.weight)
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
    for index, layer in enumerate(model.model.layers):
        state = layer_state(made.decoder, index, str(made.statistics))
        for linear, (weight, rows) in places(layer, name).items():
            site = state.statistics[state.plan.site_of[linear]]
            solved = gptq(weight.data[rows], site, wanted_scheme)
            weight.data[rows] = solved.weight()
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
