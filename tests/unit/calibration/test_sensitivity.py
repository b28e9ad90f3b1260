"""Sensitivities of linears and layers equal gradients of the whole model, whatever the number of sweeps, and
predict divergences of small errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from family_models import build
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.sensitivity import measure_sensitivities
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.inference.transform import fit, folded_ends
from quantgrid.machine.chunks import HELD
from quantgrid.models.canonical import shape_of
from quantgrid.models.lm_head import head_of
from quantgrid.models.plans import END_ROLES
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.transforms.recipes import random_hadamard
from selection import others_slow
from tiny_decoders import save

WINDOWS, LENGTH = 3, 12
FAMILIES = ("LlamaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM")
SOME = others_slow(FAMILIES, lambda name: name in ("LlamaForCausalLM", "Qwen2MoeForCausalLM"))


def tokens_for(folder) -> torch.Tensor:
    vocabulary = DecoderFolder(folder).shape.vocabulary
    return torch.randint(vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))


def hook(layer, plan, kept, chosen):
    """Keep outputs of linears with their gradients, and the choices of a router; returns the handles."""

    def keep(linear):
        def look(module, _inputs, output):
            output.retain_grad()
            kept[linear] = output, module.bias

        return look

    handles = [layer.get_submodule(plan.modules[name]).register_forward_hook(keep(name)) for name in plan.linears]
    if plan.expert_sites:
        handles.append(
            layer.get_submodule(plan.sites["mlp_input"].block).experts.register_forward_pre_hook(
                lambda _, inputs: chosen.append(inputs[1])
            )
        )
    return handles


def whole_model_sums(folder, tokens, seed, skip):
    """(sum of squared gradients, of squared outputs without bias, tokens) by linear, and sums (layers, d) of
    squared gradients of layer outputs: one graph of the whole model in float64, tokens drawn window by
    window from its own logits."""
    model, generator = load_full_precision(folder, torch.float64), torch.Generator().manual_seed(seed)
    shape, found = shape_of(model), {}
    channels = torch.zeros(shape.layers, shape.hidden_size, dtype=torch.float64)
    for window in tokens:
        seen = [({}, []) for _ in range(shape.layers)]
        handles = [
            handle
            for index, layer in enumerate(model.model.layers)
            for handle in hook(layer, shape.plan(index), *seen[index])
        ]
        outputs = []
        handles += [layer.register_forward_hook(keep_in(outputs)) for layer in model.model.layers]
        logits = model(window[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
        channels += torch.stack([output.grad[0, skip:].square().sum(0) for output in outputs])
        for index, (kept, chosen) in enumerate(seen):
            for linear, (output, bias) in kept.items():
                add(found, f"{index}.{linear}", output, bias, rows_of(linear, chosen) >= skip)
        for handle in handles:
            handle.remove()
    return found, channels


def keep_in(outputs):
    """Hook that appends the output of a layer to ``outputs``, which keep their gradients."""

    def look(_module, _inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)
        outputs[-1].retain_grad()

    return look


def rows_of(linear, chosen):
    """Positions of the rows of a linear: those of an expert go by the places of the choices."""
    number = linear.partition(".")[2]
    if not number.isdecimal():
        return torch.arange(LENGTH)
    return torch.cat([torch.where(place == int(number))[0] for place in chosen[0].mT])


def add(found, name, output, bias, kept):
    plain = output if bias is None else output - bias
    sums = [part.detach().reshape(len(kept), -1)[kept].square().sum() for part in (output.grad, plain)]
    before = found.get(name, (0.0, 0.0, 0))
    found[name] = (before[0] + sums[0], before[1] + sums[1], before[2] + int(kept.sum()))


@pytest.mark.parametrize("architecture", SOME)
@pytest.mark.parametrize("skip", [0, 4])
def test_sums_are_those_of_one_graph_of_the_whole_model(architecture, skip, tmp_path):
    build(architecture, tmp_path)
    tokens = tokens_for(tmp_path)
    measured = measure_sensitivities(streamed(FullPrecision(tmp_path, torch.float64)), tokens, 5, skip)
    (wanted, channels), shape = whole_model_sums(tmp_path, tokens, 5, skip), DecoderFolder(tmp_path).shape
    found = measured.linears
    assert set(wanted) <= set(found) == {f"{i}.{name}" for i in range(shape.layers) for name in shape.plan(i).linears}
    total = WINDOWS * (LENGTH - skip)
    assert torch.allclose(measured.channels, channels / total, rtol=1e-5)
    for name, entry in found.items():
        gradients, squares, count = wanted.get(name, (0.0, 0.0, 0))
        outputs = shape.linear_size(name.partition(".")[2])[0]
        assert entry["share"] == count / total
        assert entry["gradient_square"] == pytest.approx(float(gradients) / max(1, count) / outputs, rel=1e-5)
        assert entry["output_square"] == pytest.approx(float(squares) / max(1, count), rel=1e-5)
    assert any(entry["share"] < 1 for entry in found.values()) == bool(shape.experts)


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM"])
def test_neither_sweeps_nor_streaming_change_the_result(architecture, tmp_path):
    build(architecture, tmp_path)
    tokens = tokens_for(tmp_path)
    whole = measure_sensitivities(load_full_precision(tmp_path), tokens, 1)
    for held in (1, HELD):
        found = measure_sensitivities(streamed(FullPrecision(tmp_path)), tokens, 1, held=held)
        assert found.linears == whole.linears and torch.equal(found.channels, whole.channels)
    other = measure_sensitivities(load_full_precision(tmp_path), tokens, 2)
    assert other.linears != whole.linears and not torch.equal(other.channels, whole.channels)


def test_a_small_error_of_an_output_costs_the_predicted_divergence(tmp_path):
    """Finite difference: random errors of the outputs of one linear against E|g|^2/m E|e|^2 / 2, whose
    only approximation is that gradients do not prefer directions of the errors."""
    build("LlamaForCausalLM", tmp_path)
    tokens = torch.randint(61, (24, LENGTH), generator=torch.Generator().manual_seed(3))
    model = load_full_precision(tmp_path, torch.float64)
    found = measure_sensitivities(model, tokens, 0).linears
    with torch.no_grad():
        wanted = log_softmax(model(tokens, use_cache=False).logits, -1)
        for name, path in (("0.o", "self_attn.o_proj"), ("1.down", "mlp.down_proj"), ("0.v", "self_attn.v_proj")):
            generator = torch.Generator().manual_seed(9)
            module, divergences, squares = model.model.layers[int(name[0])].get_submodule(path), [], []
            for _ in range(12):
                error = 1e-3 * torch.randn(24, LENGTH, module.out_features, generator=generator, dtype=torch.float64)
                handle = module.register_forward_hook(lambda _module, _inputs, output, error=error: output + error)
                logs = log_softmax(model(tokens, use_cache=False).logits, -1)
                handle.remove()
                divergences.append(kl_div(logs, wanted, reduction="sum", log_target=True) / tokens.numel())
                squares.append(error.square().sum(-1).mean())
            predicted = found[name]["gradient_square"] * torch.stack(squares).mean() / 2
            assert torch.stack(divergences).mean().item() == pytest.approx(predicted.item(), rel=0.15), name


def test_errors_of_channels_of_a_layer_cost_the_predicted_divergence(tmp_path):
    """Finite difference: independent errors of the channels of a layer's output against sum E[g_c^2] e_c^2 / 2;
    the channels that cost least cost less than the others do."""
    build("LlamaForCausalLM", tmp_path)
    tokens = torch.randint(61, (24, LENGTH), generator=torch.Generator().manual_seed(3))
    model = load_full_precision(tmp_path, torch.float64)
    weights = measure_sensitivities(model, tokens, 0).channels[0]
    small = weights < weights.median()
    with torch.no_grad():
        wanted, costs = log_softmax(model(tokens, use_cache=False).logits, -1), []
        for part in (small, ~small):
            generator, divergences = torch.Generator().manual_seed(9), []
            for _ in range(12):
                error = 1e-3 * part * torch.randn(24, LENGTH, len(part), generator=generator, dtype=torch.float64)
                handle = model.model.layers[0].register_forward_hook(lambda *given, error=error: given[-1] + error)
                logs = log_softmax(model(tokens, use_cache=False).logits, -1)
                handle.remove()
                divergences.append(kl_div(logs, wanted, reduction="sum", log_target=True) / tokens.numel())
            costs.append(torch.stack(divergences).mean().item())
            assert costs[-1] == pytest.approx(1e-6 * weights[part].sum().item() / 2, rel=0.15)
    assert costs[0] < 0.8 * costs[1]


def test_a_rotation_of_inputs_and_stream_keeps_gradients(tmp_path):
    """Outputs of q, k, gate and up are those of before; those of o and down are rotated, and v by heads."""
    build("LlamaForCausalLM", tmp_path / "plain", attention_bias=False, mlp_bias=False)
    decoder = DecoderFolder(tmp_path / "plain")
    transform = fit(random_hadamard.primitives(1, ("R1", "R2")), decoder, None)
    ends = folded_ends(transform, decoder, torch.float32)
    state = {END_ROLES[role]: tensor for role, tensor in ends.items()}
    for index in range(decoder.shape.layers):
        layer = decoder.layer(index)
        transform.fold_layer(layer)
        assert not any(layer.online.values())
        state |= {f"model.layers.{index}.{layer.plan.tensors[role]}": tensor for role, tensor in layer.weights.items()}
    save(tmp_path / "turned", decoder.config, state)
    tokens = tokens_for(tmp_path / "plain")
    plain, turned = (
        measure_sensitivities(load_full_precision(tmp_path / name, torch.float64), tokens, 0).linears
        for name in ("plain", "turned")
    )
    for name, entry in plain.items():
        for part in ("gradient_square", "output_square"):
            assert turned[name][part] == pytest.approx(entry[part], rel=0.01), (name, part)


def test_windows_without_tokens_and_models_that_overflow_are_refused(tmp_path):
    build("LlamaForCausalLM", tmp_path)
    model, tokens = load_full_precision(tmp_path), tokens_for(tmp_path)
    with pytest.raises(ConfigError, match=f"skip_first {LENGTH} leaves no tokens"):
        measure_sensitivities(model, tokens, skip_first=LENGTH)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(1e38)
    with pytest.raises((NumericalFailure, RuntimeError)):
        measure_sensitivities(model, tokens)
    assert head_of(model).weight.isfinite().all()
