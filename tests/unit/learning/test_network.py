"""The differentiable decoder is the rounded one, and gradients reach every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learned_cases import (
    EXPERTS,
    HELD_OUT,
    LEARNED,
    NOTHING,
    SPARSE,
    learned,
    learned_values,
    logits_of,
    network,
    schemes,
    shaken,
    start,
)
from quantgrid.learning import straight_through
from quantgrid.learning.network import Folding
from quantgrid.learning.objectives import AllLayers, EndToEnd, FourthPower, OneLayer
from quantgrid.learning.trainables import Trainables, learned_kinds
from quantgrid.learning.training import descend
from quantgrid.models.plans import SITES
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.primitives import rotate
from reference_decoder import logits
from reference_statistics import apply_online, close
from selection import others_slow
from tiny_decoders import VARIED


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "data_free_rotation"])
@pytest.mark.parametrize("case", others_slow([*VARIED, *EXPERTS], lambda case: case in (*VARIED, SPARSE)), ids=str)
def test_without_rounding_the_logits_do_not_depend_on_the_parameters(case, name, given):
    made = given(case)
    begun = start(made, name)
    net = network(made, begun, NOTHING)
    for transform in (begun, shaken(begun)):
        assert close(logits_of(net, made.tokens[:2], learned_values(transform)).double(), made.logits, 1e-4)


@pytest.mark.parametrize("round_weights", [False, True])
@pytest.mark.parametrize("name", ["optimized_rotation_scaling", "flatquant"])
def test_the_network_computes_as_the_rounded_decoder(name, round_weights, given):
    """Against the reference decoder in float64 with folded, clipped, rounded weights; a few codes
    differ, as float32 is not float64."""
    made = given(VARIED[1])
    wanted = schemes("int8")
    transform = shaken(start(made, name, wanted))
    state, online, clips = dict(made.decoder.ends()), {}, {}
    transform.fold_ends(state)
    tensors = {
        "model.embed_tokens.weight": state["embedding"],
        "model.norm.weight": state["final_norm"],
        "lm_head.weight": state.get("lm_head", state["embedding"]),
    }
    for index in range(made.decoder.shape.layers):
        layer = made.decoder.layer(index)
        transform.fold_layer(layer)
        online[index], clips[index] = layer.online, layer.input_clips
        for role, (module, part) in {
            f"{linear}": (module, "weight")
            for site in SITES
            for linear, module in zip(
                SITES[site],
                {
                    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "output_input": ("self_attn.o_proj",),
                    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
                    "down_input": ("mlp.down_proj",),
                }[site],
            )
        }.items():
            weight = layer.weights[role]
            if round_weights:
                weight = fake_quantize(layer.clips[role](weight) if role in layer.clips else weight, wanted.weight)
            tensors[f"model.layers.{index}.{module}.{part}"] = weight
            if f"{role}_bias" in layer.weights:
                tensors[f"model.layers.{index}.{module}.bias"] = layer.weights[f"{role}_bias"]
        tensors[f"model.layers.{index}.input_layernorm.weight"] = layer.weights["attention_norm"]
        tensors[f"model.layers.{index}.post_attention_layernorm.weight"] = layer.weights["mlp_norm"]

    def rounded(layer: int, site: str, x: Tensor) -> Tensor:
        x = apply_online(online[layer][site], x)
        if site in clips[layer]:  # asymmetric, per token
            low, high = (clips[layer][site][end].double() for end in ("clip_low", "clip_high"))
            x = torch.minimum(
                torch.maximum(x, low * x.amin(-1, keepdim=True).clamp(max=0)),
                high * x.amax(-1, keepdim=True).clamp(min=0),
            )
        return fake_quantize(x, wanted.activation[site][0])

    reference = logits(tensors, made.config, made.tokens[:2], rounded)
    net = network(made, start(made, name, wanted), wanted, round_weights)
    found = logits_of(net, made.tokens[:2], learned_values(transform)).double()
    assert (found - reference).norm() < 0.2 * (reference - made.logits).norm()


@pytest.mark.parametrize("case", [VARIED[1], SPARSE], ids=str)
@pytest.mark.parametrize(
    "name, objective",
    [
        ("optimized_rotation", "end_to_end"),
        ("optimized_rotation", "layer_wise"),
        ("flatquant", "layer"),
        ("optimized_rotation_scaling", "end_to_end"),
        ("optimized_rotation_scaling", "layer_wise"),
        ("optimized_scaling", "layer"),
        ("data_free_rotation", "weights"),
    ],
)
def test_gradients_reach_every_parameter(name, objective, case, given):
    """In three windows every expert gets a token."""
    made = given(case)
    begun = start(made, name)
    parameters = shaken(begun).parameters if name == "flatquant" else begun.parameters
    if name == "data_free_rotation":
        trainables, wanted = Trainables(parameters, learned_kinds(begun)), FourthPower(Folding(made.folder, begun))
        batch = list(range(made.decoder.shape.layers))
    else:
        net = network(made, begun, schemes(), round_weights=objective == "layer")
        hidden = net.embedded(net.windows)
        trainables = Trainables(parameters, learned_kinds(begun, [0] if objective == "layer" else None))
        batch = [0, 1, 2]
        wanted = {
            "end_to_end": lambda: EndToEnd(net, HELD_OUT),
            "layer_wise": lambda: AllLayers(net, HELD_OUT),
            "layer": lambda: OneLayer(net, HELD_OUT, 0, hidden, net.full_precision_layer(0, hidden), "squared"),
        }[objective]()
    descend(trainables, wanted, batch)
    for name, form in zip(trainables.kinds, trainables.forms):
        gradient = next(form.parameters()).grad
        assert gradient is not None and gradient.abs().max() > 0 and torch.isfinite(gradient).all(), name


def test_gradients_pass_a_head_of_several_blocks(given, monkeypatch):
    """The basis of the head is folded in several blocks of rows."""
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation")
    net, found = network(made, begun, schemes(), round_weights=True), []
    for block in (512, 16):
        monkeypatch.setattr(rotate, "BLOCK", block)
        trainables = Trainables(begun.parameters, learned_kinds(begun))
        descend(trainables, EndToEnd(net, HELD_OUT), [0])
        found.append(next(trainables.parameters()).grad)
    assert close(found[1], found[0], 1e-5)


def test_a_cell_that_rounds_weights_alone_is_trained_with_rounded_weights(given):
    wanted = CellSchemes(weight=scheme("int4"))
    _, done = learned(given(VARIED[1]), "optimized_rotation", wanted, objective="layer_wise", steps=6, batch_size=2)
    assert done.ends["all"]["start"] > 1e-5 and done.losses.count("\n") == 7


def test_pieces_give_the_gradient_of_their_sum(given):
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation_scaling")
    wanted = AllLayers(network(made, begun, schemes()), HELD_OUT)
    ours, plain = (Trainables(begun.parameters, learned_kinds(begun)) for _ in range(2))
    loss = descend(ours, wanted, [0, 2])
    whole = sum(wanted.pieces(plain.values(), [0, 2]))
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    assert all(close(one.grad, other.grad, 1e-4) for one, other in zip(ours.parameters(), plain.parameters()))


@pytest.mark.parametrize("case", [*VARIED, SPARSE], ids=str)
@pytest.mark.parametrize("name", ["optimized_rotation", "optimized_rotation_scaling"])
def test_mapped_inputs_compute_as_folded_weights(name, case, given, monkeypatch):
    """The same logits and the same gradients, along the manifold for rotations, whether the
    transform is folded or mapped around the rounding, whose values are a smooth function here, so
    that no code flips."""
    monkeypatch.setattr(straight_through, "fake_quantize", lambda x, scheme: x.tanh())
    made = given(case)
    begun = start(made, name)
    values = learned_values(shaken(begun))
    nets = [network(made, begun, schemes("int8")) for _ in range(2)]
    nets[1].mapped = False
    assert nets[0].mapped
    found = []
    for net in nets:
        leaves = {parameter: value.clone().requires_grad_() for parameter, value in values.items()}
        logits = logits_of(net, made.tokens[:2], leaves)
        (logits - made.logits.float()).square().mean().backward()
        found.append((logits.detach(), {parameter: tangent(leaf) for parameter, leaf in leaves.items()}))
    (mapped, gradients), (folded, wanted) = found
    assert close(mapped, folded, 1e-4) and not close(folded, made.logits.float(), 0.1)
    assert all(close(gradients[parameter], gradient, 2e-3) for parameter, gradient in wanted.items())


def tangent(leaf: Tensor) -> Tensor:
    """The gradient, of square matrices its part along the orthogonal group."""
    if leaf.dim() < 2:
        return leaf.grad
    turned = leaf.detach().mT @ leaf.grad
    return turned - turned.mT
