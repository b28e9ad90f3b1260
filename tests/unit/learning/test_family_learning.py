"""Learning on other families than Llama: the differentiable network is the streamed, transformed, rounded
model, its loss at the start is that model's, and a step leaves the function as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from family_cases import FamilyModel, can_be_online
from learned_cases import online_options, recipe, schemes, shaken
from quantgrid.corpora import token_windows
from quantgrid.evaluation import gates
from quantgrid.evaluation.gates import DIVERGENCE, LOGITS, Agreement, transformed_logits
from quantgrid.inference.transform import Transform, fit
from quantgrid.learning import straight_through
from quantgrid.learning.network import Network
from quantgrid.learning.trainables import learned_kinds
from quantgrid.learning.training_context import TrainingContext
from quantgrid.models.lm_head import head_of
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_quantized, save_quantized
from quantgrid.quantization.sequential import RunningLayer
from quantgrid.schemes.cell_schemes import CellSchemes
from selection import others_slow

# (family, learned transform): scaled embeddings and logits, gains stored as 1 + w, joined linears, norms
# before and behind the linears, norms behind them only
CASES = [
    ("GraniteForCausalLM", "optimized_rotation"),
    ("GemmaForCausalLM", "optimized_rotation"),
    ("Phi3ForCausalLM", "flatquant"),
    ("Gemma3ForCausalLM", "flatquant"),
    ("Gemma3ForCausalLM", "optimized_rotation_scaling"),
    ("Olmo2ForCausalLM", "optimized_rotation"),
    ("GraniteForCausalLM", "optimized_rotation_scaling"),
    ("GemmaForCausalLM", "flatquant"),
    ("SmolLM3ForCausalLM", "optimized_rotation"),
    ("GlmForCausalLM", "optimized_rotation"),
    ("Phi3ForCausalLM", "optimized_rotation"),
    ("Glm4ForCausalLM", "flatquant"),
    ("Gemma2ForCausalLM", "flatquant"),
    ("Gemma2ForCausalLM", "optimized_scaling"),
    ("Glm4ForCausalLM", "optimized_rotation"),
    ("Exaone4ForCausalLM", "optimized_rotation_scaling"),
    ("Olmo3ForCausalLM", "optimized_scaling"),
    ("Olmo2ForCausalLM", "flatquant"),
    ("OPTForCausalLM", "optimized_rotation"),
    ("GPTNeoXForCausalLM", "optimized_rotation_scaling"),
    ("StableLmForCausalLM", "optimized_rotation_scaling"),
    ("StableLmForCausalLM", "flatquant"),
    ("CohereForCausalLM", "optimized_rotation"),
]
SELECTED = others_slow(CASES, lambda *case: case in CASES[:6])
INT8 = schemes("int8")


@pytest.fixture(autouse=True)
def smooth(monkeypatch):
    """A smooth function for every rounding, so that float32 noise flips no code."""
    monkeypatch.setattr(straight_through, "fake_quantize", lambda x, scheme: x.tanh())


class Rounded(RunningLayer):
    """Running layer with rounded inputs and, if ``weights``, rounded weights."""

    weights = False

    def __init__(self, module: nn.Module, layer: Any, roundings: Any, how: Any):
        for linear in layer.plan.linears if self.weights else ():
            clipped = layer.clips[linear](layer.weights[linear]) if linear in layer.clips else layer.weights[linear]
            layer.weights[linear] = clipped.float().tanh().double()
        super().__init__(module, layer, {site: nn.Tanh() for site in layer.plan.sites}, how)


@torch.no_grad()
def rounded_logits(made: FamilyModel, transform: Transform, windows: Tensor, weights: bool, monkeypatch) -> Tensor:
    """Logits of the streamed model under ``transform`` with everything rounded."""
    monkeypatch.setattr(Rounded, "weights", weights)
    with monkeypatch.context() as patched:
        patched.setattr(gates, "RunningLayer", Rounded)
        return transformed_logits(made.decoder, transform, windows)


def started(made: FamilyModel, name: str) -> Transform:
    """Start of a learned transform, online where the family needs that."""
    options = {"clip_activations": False} if name == "flatquant" else {}
    options |= online_options(name, made.decoder.shape.architecture)
    module, given = recipe(name, INT8, 1, **options)
    return fit(module.primitives(**given), made.decoder, str(made.statistics))


@pytest.mark.parametrize("round_weights", [False, True])
@pytest.mark.parametrize("family, name", SELECTED)
@torch.no_grad()
def test_the_network_is_the_streamed_rounded_model(family, name, round_weights, family_model, monkeypatch):
    made = family_model(family)
    begun = started(made, name)
    transform = shaken(begun)
    network = Network(made.folder, begun, INT8, round_weights, made.tokens)
    assert network.mapped == (not round_weights and name.startswith("optimized_rotation"))
    values = {parameter: transform.parameters[parameter].float() for parameter in learned_kinds(transform)}
    found = head_of(network.model)(network.last_hidden(made.tokens, values))
    wanted = rounded_logits(made, transform, made.tokens, round_weights, monkeypatch)
    assert Agreement.of(found, wanted, made.tokens).logits < LOGITS
    assert Agreement.of(wanted, made.logits, made.tokens).logits > 0.1  # the rounding counts


@pytest.mark.parametrize("objective", ["end_to_end", "layer_wise"])
@pytest.mark.parametrize("family", ["GraniteForCausalLM", "GemmaForCausalLM", "Olmo2ForCausalLM"])
def test_a_step_starts_from_the_loss_of_the_model_and_keeps_its_function(
    family, objective, family_model, tmp_path, monkeypatch
):
    made, windows = family_model(family), tmp_path / "windows.safetensors"
    token_windows.save(windows, made.windows[:3], {})
    begun = started(made, "optimized_rotation")
    module, options = recipe("optimized_rotation", INT8, 1, objective=objective, steps=1, batch_size=1)
    done = module.learn(begun, TrainingContext(made.folder, windows), **{**options, "held_out": 1})
    if objective == "end_to_end":
        logits = rounded_logits(made, begun, made.windows[2:3], False, monkeypatch)
        wanted = cross_entropy(logits[:, :-1].flatten(0, 1), made.windows[2, 1:]).item()
        assert done.ends["all"]["start"] == pytest.approx(wanted, rel=1e-5)
    assert done.losses.count("\n") == 2 and done.ends["all"]["start"] > 0
    moved = {name for name, kind in learned_kinds(begun).items() if kind == "rotation"}
    changed = {name for name in moved if not torch.equal(done.transform.parameters[name], begun.parameters[name])}
    assert changed == (moved if done.ends["all"]["kept"] == "learned" else set())
    found = transformed_logits(made.decoder, done.transform, made.tokens)
    assert Agreement.of(found, made.logits, made.tokens).within(LOGITS, DIVERGENCE)


@pytest.mark.parametrize(
    "family, name",
    [
        ("Olmo2ForCausalLM", "optimized_rotation"),
        ("Gemma3ForCausalLM", "optimized_rotation_scaling"),
        ("Glm4ForCausalLM", "data_free_rotation"),
        ("Exaone4ForCausalLM", "optimized_scaling"),
        ("Olmo3ForCausalLM", "flatquant"),
    ],
)
def test_a_training_online_lowers_the_loss_and_keeps_the_function(family, name, family_model, tmp_path, monkeypatch):
    """Families with norms behind the linears."""
    made, windows = family_model(family), tmp_path / "windows.safetensors"
    token_windows.save(windows, made.windows, {})
    begun = started(made, name)
    wanted = {"clip_activations": False} if name == "flatquant" else {}
    module, options = recipe(name, INT8, 1, **wanted, steps=10, batch_size=2)
    options |= {"held_out": 1} if "held_out" in options else {}
    done = module.learn(begun, TrainingContext(made.folder, windows), **options)
    assert all((end["kept"] == "learned") == (end["end"] < end["start"]) for end in done.ends.values())
    assert any(end["kept"] == "learned" for end in done.ends.values())
    learned = [primitive for primitive in begun.primitives if hasattr(primitive, "learns")]
    assert any(primitive.online for primitive in learned if can_be_online(primitive))
    found = transformed_logits(made.decoder, done.transform, made.tokens)
    assert Agreement.of(found, made.logits, made.tokens).within(LOGITS, DIVERGENCE)


@pytest.mark.parametrize(
    "family, name", [("Olmo2ForCausalLM", "optimized_rotation"), ("Gemma3ForCausalLM", "optimized_rotation_scaling")]
)
@torch.no_grad()
def test_learned_operations_at_run_time_reach_the_checkpoint(family, name, family_model, tmp_path):
    """Nothing is rounded but the weights, to bfloat16."""
    made = family_model(family)
    done = quantize_decoder(made.decoder, Recipe(shaken(started(made, name)), CellSchemes(), None, None))
    save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {})
    found = load_quantized(tmp_path)(made.tokens).logits
    assert 1e-5 < (found - made.logits).norm() / made.logits.norm() < 0.03


@pytest.mark.parametrize(
    "family", others_slow(["Gemma3ForCausalLM", "Phi3ForCausalLM", "Glm4ForCausalLM"], "Phi3ForCausalLM".__eq__)
)
def test_layers_are_trained_one_by_one(family, family_model, tmp_path):
    made, windows = family_model(family), tmp_path / "windows.safetensors"
    token_windows.save(windows, made.windows[:3], {})
    begun = started(made, "flatquant")
    module, options = recipe("flatquant", INT8, 1, clip_activations=False, steps=1, batch_size=1)
    done = module.learn(begun, TrainingContext(made.folder, windows), **{**options, "held_out": 1})
    assert [*done.ends] == ["0", "1"] and all(end["start"] > 0 for end in done.ends.values())
    found = transformed_logits(made.decoder, done.transform, made.tokens)
    assert Agreement.of(found, made.logits, made.tokens).within(LOGITS, DIVERGENCE)
