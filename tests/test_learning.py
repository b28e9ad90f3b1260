"""Learning: the differentiable decoder is the rounded one, gradients reach every parameter, and training never ends worse than it began."""

from __future__ import annotations

import math
from functools import cache
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from learned_cases import HELD_OUT, LEARNED, VARIED, Given, Interrupted, interrupted_at, recipe, schemes, shaken, start
from quantgrid.architecture import SITES
from quantgrid.cell_schemes import CellSchemes
from quantgrid.errors import ConfigError, NumericalFailure
from quantgrid.learning import objectives
from quantgrid.learning.network import Folding, Network
from quantgrid.learning.objectives import AllLayers, EndToEnd, FourthPower, OneLayer, divided, squared_error
from quantgrid.learning.session import Session
from quantgrid.learning.trainables import Trainables, learned_kinds
from quantgrid.learning.training import Settings, descend, train
from quantgrid.quantizer import fake_quantize, scheme
from quantgrid.transforms import rotate
from quantgrid.transforms.composition import Parameters, Transform
from reference_decoder import logits
from reference_statistics import apply_online, close

NOTHING = CellSchemes()
OBJECTIVES = [("optimized_rotation", {"objective": "end_to_end"}), ("optimized_rotation", {"objective": "layer_wise"}),
              ("optimized_rotation_scaling", {"objective": "end_to_end", "top": 20}), ("optimized_rotation_scaling", {"objective": "layer_wise"}),
              ("optimized_rotation", {"objective": "layer_wise", "round_weights": True}), ("optimized_scaling", {}), ("flatquant", {}),
              ("flatquant", {"error": "relative"}), ("data_free_rotation", {"goal": "minimize"}), ("data_free_rotation", {"goal": "maximize"})]
RATES = {"rotation": 5e-2, "cayley": 1e-2, "positive": 1e-2, "fraction": 1e-2}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return cache(lambda case: Given.make(tmp_path_factory.mktemp("case"), case))


def network(made: Given, transform: Transform, wanted: CellSchemes, round_weights: bool = False) -> Network:
    return Network(made.folder, transform, wanted, round_weights, made.tokens)


def learned_values(transform: Transform) -> Parameters:
    return {name: transform.parameters[name].float() for name in learned_kinds(transform)}


def learned(made: Given, name: str, wanted: CellSchemes | None = None, place: dict | None = None, **options):
    module, told = recipe(name, wanted, **options)
    begun = start(made, name, wanted, **options)
    return begun, module.learn(begun, made.place(**(place or {})), **told)


# -- the network ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "data_free_rotation"])
@pytest.mark.parametrize("case", VARIED, ids=str)
def test_without_rounding_the_logits_do_not_depend_on_the_parameters(case, name, given):
    made = given(case)
    begun = start(made, name)
    net = network(made, begun, NOTHING)
    for transform in (begun, shaken(begun)):
        assert close(net.logits(made.tokens[:2], learned_values(transform)).double(), made.logits, 1e-4)


@pytest.mark.parametrize("round_weights", [False, True])
@pytest.mark.parametrize("name", ["optimized_rotation_scaling", "flatquant"])
def test_the_network_computes_as_the_rounded_decoder(name, round_weights, given):
    """Against the reference decoder in float64 with folded, clipped, rounded weights; a few codes differ, as float32 is not float64."""
    made = given(VARIED[1])
    wanted = schemes("int8")
    transform = shaken(start(made, name, wanted))
    state, online, clips = dict(made.decoder.ends()), {}, {}
    transform.fold_ends(state)
    tensors = {"model.embed_tokens.weight": state["embedding"], "model.norm.weight": state["final_norm"],
               "lm_head.weight": state.get("lm_head", state["embedding"])}
    for index in range(made.decoder.shape.layers):
        layer = made.decoder.layer(index)
        transform.fold_layer(layer)
        online[index], clips[index] = layer.online, layer.input_clips
        for role, (module, part) in {f"{linear}": (module, "weight") for site in SITES for linear, module in
                                     zip(SITES[site], {"attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                                                       "output_input": ("self_attn.o_proj",), "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
                                                       "down_input": ("mlp.down_proj",)}[site])}.items():
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
            x = torch.minimum(torch.maximum(x, low * x.amin(-1, keepdim=True).clamp(max=0)), high * x.amax(-1, keepdim=True).clamp(min=0))
        return fake_quantize(x, wanted.activation[site][0])

    reference = logits(tensors, made.config, made.tokens[:2], rounded)
    found = network(made, start(made, name, wanted), wanted, round_weights).logits(made.tokens[:2], learned_values(transform)).double()
    assert (found - reference).norm() < 0.2 * (reference - made.logits).norm()


@pytest.mark.parametrize("name, objective", [("optimized_rotation", "end_to_end"), ("optimized_rotation", "layer_wise"), ("flatquant", "layer"),
                                             ("optimized_rotation_scaling", "end_to_end"), ("optimized_rotation_scaling", "layer_wise"),
                                             ("optimized_scaling", "layer"), ("data_free_rotation", "weights")])
def test_gradients_reach_every_parameter(name, objective, given):
    made = given(VARIED[1])
    begun = start(made, name)
    parameters = shaken(begun).parameters if name == "flatquant" else begun.parameters
    if name == "data_free_rotation":
        trainables, wanted = Trainables(parameters, learned_kinds(begun)), FourthPower(Folding(made.folder, begun))
        batch = [0, 1]
    else:
        net = network(made, begun, schemes(), round_weights=objective == "layer")
        hidden = net.embedded(net.windows)
        trainables = Trainables(parameters, learned_kinds(begun, [0] if objective == "layer" else None))
        batch = [0, 1, 2]
        wanted = {"end_to_end": lambda: EndToEnd(net, HELD_OUT), "layer_wise": lambda: AllLayers(net, HELD_OUT),
                  "layer": lambda: OneLayer(net, HELD_OUT, 0, hidden, net.full_precision_layer(0, hidden), "squared")}[objective]()
    descend(trainables, wanted, batch)
    for name, form in zip(trainables.kinds, trainables.forms):
        gradient = next(form.parameters()).grad
        assert gradient is not None and gradient.abs().max() > 0 and torch.isfinite(gradient).all(), name


def test_gradients_pass_a_head_of_several_blocks(given, monkeypatch):
    """The basis of the head is folded some rows at a time."""
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


@pytest.mark.parametrize("case", VARIED, ids=str)
@pytest.mark.parametrize("name", ["optimized_rotation", "optimized_rotation_scaling"])
def test_mapped_inputs_compute_as_folded_weights(name, case, given, monkeypatch):
    """The same logits and the same gradients, along the manifold for rotations, whether the transform is folded or mapped around the rounding,
    which is a smooth function here, so that no code flips."""
    monkeypatch.setattr(Network, "_rounding", lambda self, layer, site: torch.nn.Tanh())
    made = given(case)
    begun = start(made, name)
    values = learned_values(shaken(begun))
    nets = [network(made, begun, schemes("int8")) for _ in range(2)]
    nets[1].mapped = False
    assert nets[0].mapped
    found = []
    for net in nets:
        leaves = {parameter: value.clone().requires_grad_() for parameter, value in values.items()}
        logits = net.logits(made.tokens[:2], leaves)
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


# -- free forms ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_free_forms_begin_at_the_start(name, given):
    begun = start(given(VARIED[0]), name)
    trainables = Trainables(begun.parameters, learned_kinds(begun))
    assert trainables.kinds and set(trainables.values()) == set(learned_kinds(begun))
    for parameter, value in trainables.values().items():
        assert close(value.double(), begun.parameters[parameter], 1e-6)
        if name.startswith("optimized_rotation"):
            assert torch.equal(value.double(), begun.parameters[parameter])


def test_exported_rotations_are_orthogonal(given):
    made = given(VARIED[1])
    _, done = learned(made, "optimized_rotation", objective="layer_wise", steps=15, learning_rate=0.05)
    assert done.ends["all"]["kept"] == "learned"
    moved = 0.0
    for name, kind in learned_kinds(done.transform).items():
        matrix = done.transform.parameters[name]
        assert kind == "rotation" and matrix.dtype == torch.float64
        identity = torch.eye(matrix.shape[-1], dtype=torch.float64).expand_as(matrix)
        assert (matrix @ matrix.mT - identity).abs().max() < 1e-10
        moved = max(moved, (matrix - identity).abs().max().item())
    assert moved > 1e-2


@pytest.mark.parametrize("width", [8, 64, 256])
def test_a_step_turns_a_matrix_of_any_width_as_far(width):
    """At the published rate 0.0161: 2 sqrt(2) x 0.0161 in the Frobenius norm, where Adam on every entry turned 0.18, 2.0 and 5.2."""
    start = {"0.0.matrix": torch.eye(width, dtype=torch.float64)}
    trainables = Trainables(start, {"0.0.matrix": "rotation"})
    optimizer = trainables.optimizer({"rotation": 0.0161})
    loss = (trainables.values()["0.0.matrix"] * torch.randn(width, width, generator=torch.Generator().manual_seed(0))).sum()
    loss.backward()
    optimizer.step()
    turned = trainables.exported()["0.0.matrix"] - torch.eye(width, dtype=torch.float64)
    assert turned.norm().item() == pytest.approx(2 * math.sqrt(2) * 0.0161, rel=1e-3)


# -- objectives ----------------------------------------------------------------------------------------------------------------------------


def test_losses_are_what_they_say(given):
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation")
    plain, rounded = network(made, begun, NOTHING), network(made, begun, schemes())
    values = learned_values(begun)

    def of(net: Network, loss: str, top: int = 61) -> float:
        return sum(EndToEnd(net, HELD_OUT, loss, top).pieces(values, [0, 1])).item()

    wanted = cross_entropy(made.logits[:, :-1].flatten(0, 1), made.tokens[:2, 1:].flatten()).item()
    assert of(plain, "cross_entropy") == pytest.approx(wanted, rel=1e-4)
    assert abs(of(plain, "kl_top")) < 1e-4
    teacher, student = made.logits.log_softmax(-1), rounded.logits(made.tokens[:2], values).double().log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    assert of(rounded, "kl_top") == pytest.approx(divergence.mean().item(), rel=1e-3)
    best, where = teacher.topk(5)
    assert of(rounded, "kl_top", 5) == pytest.approx((best.exp() * (best - student.gather(-1, where))).sum(-1).mean().item(), rel=1e-3)


def test_the_layer_wise_error_vanishes_without_rounding(given):
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation_scaling")
    values = learned_values(shaken(begun))
    exact, rounded = (sum(AllLayers(network(made, begun, wanted), HELD_OUT).pieces(values, [0, 1])).item()
                      for wanted in (NOTHING, schemes()))
    assert 0 <= exact < 1e-8 < 1e-4 < rounded


def test_a_relative_error_weighs_all_tokens_alike():
    wanted = torch.ones(1, 2, 4)
    wanted[0, 0] *= 1000
    found = wanted * torch.tensor([1.1, 1.3])[None, :, None]
    assert squared_error(found, wanted, "relative").item() == pytest.approx((0.01 + 0.09) / 2, rel=1e-4)
    assert squared_error(found, wanted, "squared").item() == pytest.approx(0.01, rel=1e-3)


def test_the_fourth_power_is_that_of_the_folded_weights(given):
    made = given(VARIED[1])
    begun = start(made, "data_free_rotation")
    layer = made.decoder.layer(1)
    begun.fold_layer(layer)
    weights = [layer.weights[linear].flatten() for site in SITES for linear in SITES[site]]
    wanted = sum((w**4).mean() / (w**2).mean() ** 2 for w in weights) / 7
    found = sum(FourthPower(Folding(made.folder, begun), -1.0).pieces(learned_values(begun), [1])).item()
    assert -found == pytest.approx(wanted.item(), rel=1e-5)


def test_items_that_are_compared_are_in_no_batch(given):
    made = given(VARIED[1])
    objective = EndToEnd(network(made, start(made, "optimized_rotation"), schemes()), HELD_OUT)
    drawn = set(chain(*(Settings(40, 3, RATES).batch(objective.count, step) for step in range(40))))
    assert len(objective.compared) == HELD_OUT >= 16 and drawn == set(range(objective.count)) and not drawn & set(objective.compared)
    with pytest.raises(ConfigError, match="holds 16 windows out needs more than its 16"):
        divided(16, 16)


# -- training ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", OBJECTIVES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())))
def test_training_does_not_end_worse_than_it_began(name, options, given):
    made = given(VARIED[1])
    begun, done = learned(made, name, steps=12, batch_size=2, **options)
    assert done.ends and set(done.transform.parameters) == set(begun.parameters)
    parts = list(done.ends)
    assert parts == (["0", "1"] if name in ("optimized_scaling", "flatquant") else ["all"])
    for part, end in done.ends.items():
        mine = [p for p in learned_kinds(begun) if part == "all" or p.split(".")[1] == part]
        same = all(torch.equal(done.transform.parameters[p], begun.parameters[p]) for p in mine)
        assert (end["kept"] == "learned") == (end["end"] < end["start"]) == (not same)
    rows = [line.split(",") for line in done.losses.splitlines()]
    assert rows[0] == ["part", "step", "loss", "learning_rate"]
    assert [(row[0], int(row[1])) for row in rows[1:]] == [(part, step) for part in parts for step in range(1, 13)]
    assert all(math.isfinite(float(row[2])) for row in rows[1:])


@pytest.mark.parametrize("name, options", [("optimized_rotation_scaling", {"objective": "layer_wise"}), ("optimized_scaling", {}), ("flatquant", {}),
                                           ("data_free_rotation", {})])
def test_training_lowers_the_loss(name, options, given):
    _, done = learned(given(VARIED[1]), name, steps=40, batch_size=2, **options)
    assert sum(end["kept"] == "learned" for end in done.ends.values()) == len(done.ends)


def test_a_start_that_is_better_is_kept(given):
    rates = {"learning_rate": 50.0, "scale_learning_rate": 3.0}
    begun, done = learned(given(VARIED[1]), "optimized_rotation_scaling", objective="layer_wise", steps=5, **rates)
    assert done.ends["all"]["kept"] == "start" and done.ends["all"]["end"] > done.ends["all"]["start"]
    assert all(torch.equal(done.transform.parameters[name], tensor) for name, tensor in begun.parameters.items())


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "data_free_rotation"])
def test_where_nothing_is_rounded_nothing_is_learned(name, given):
    begun, done = learned(given(VARIED[1]), name, NOTHING, steps=5)
    assert {end["kept"] for end in done.ends.values()} == {"untrained"} and done.losses.count("\n") == 1
    assert all(torch.equal(done.transform.parameters[parameter], tensor) for parameter, tensor in begun.parameters.items())


def test_a_loss_that_is_not_finite_fails_the_cell():
    class Broken:
        count, compared = 2, [0]

        def pieces(self, values, batch):
            yield values["0.0.matrix"].sum() * (math.nan if torch.is_grad_enabled() else 1.0)

    start = {"0.0.matrix": torch.eye(3, dtype=torch.float64)}
    with pytest.raises(NumericalFailure, match="step 1 of part 'all': the loss is not finite"):
        train(start, {"0.0.matrix": "rotation"}, Broken(), Settings(3, 1, RATES), Session(), "all", "cpu")


@pytest.mark.parametrize("schedule, wanted", [("cosine", [1, 0.75, 0.25]), ("linear", [1, 2 / 3, 1 / 3])])
def test_learning_rates_fall(schedule, wanted):
    assert [Settings(3, 1, RATES, schedule).factor(step) for step in range(3)] == pytest.approx(wanted)


def test_every_item_comes_before_any_comes_again():
    settings = Settings(6, 2, RATES, seed=3)
    drawn = [settings.batch(6, step) for step in range(6)]
    assert sorted(chain(*drawn[:3])) == sorted(chain(*drawn[3:])) == list(range(6)) and drawn[:3] != drawn[3:]
    assert settings.batch(6, 4) == drawn[4] and Settings(6, 2, RATES, seed=4).batch(6, 0) != drawn[0]
    assert sorted(Settings(2, 99, RATES).batch(3, 1)) == [0, 1, 2]


def test_what_is_compared_is_the_same_in_pieces(given, monkeypatch):
    """Windows held out are taken some at a time: the sum of their pieces is the loss of all at once."""
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation")
    net = network(made, begun, schemes(), round_weights=True)
    hidden = net.embedded(net.windows)
    wanted = net.full_precision_layer(0, hidden)
    for objective in (AllLayers(net, HELD_OUT), EndToEnd(net, HELD_OUT), *(OneLayer(net, HELD_OUT, 0, hidden, wanted, error)
                                                                         for error in ("squared", "relative"))):
        found = []
        for piece in (1 << 20, 48):
            monkeypatch.setattr(objectives, "PIECE", piece)
            with torch.no_grad():
                found.append([value.item() for value in objective.pieces(learned_values(begun), objective.compared)])
        assert len(found[1]) > len(found[0]) and sum(found[1]) == pytest.approx(sum(found[0]), rel=1e-5)


# -- interruption --------------------------------------------------------------------------------------------------------------------------


def stopping(after: int):
    """A progress that raises after so many items of all loops together."""
    left = [after]

    def wrap(items):
        for item in items:
            if not left[0]:
                raise Interrupted
            left[0] -= 1
            yield item

    return wrap


@pytest.mark.parametrize("name, options, after", [("optimized_rotation_scaling", {"objective": "layer_wise"}, 4), ("data_free_rotation", {}, 1),
                                                  ("optimized_rotation", {"objective": "end_to_end"}, 7)])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(name, options, after, given, tmp_path):
    made, state = given(VARIED[1]), tmp_path / "training.safetensors"
    _, whole = learned(made, name, steps=8, batch_size=2, **options)
    with pytest.raises(Interrupted):
        learned(made, name, steps=8, batch_size=2, place={"state": state, "save_seconds": 0.0, "progress": stopping(after)}, **options)
    assert state.is_file()
    _, resumed = learned(made, name, steps=8, batch_size=2, place={"state": state, "save_seconds": 0.0}, **options)
    assert resumed.losses == whole.losses and resumed.ends == whole.ends
    assert all(torch.equal(resumed.transform.parameters[p], tensor) for p, tensor in whole.transform.parameters.items())


@pytest.mark.parametrize("place", [0.2, 0.9])
def test_a_damaged_state_is_refused(place, given, tmp_path, monkeypatch):
    """A flipped bit in the header or in a tensor."""
    made, state = given(VARIED[1]), tmp_path / "training.safetensors"
    with interrupted_at(3, monkeypatch):
        learned(made, "optimized_rotation", steps=5, batch_size=2, place={"state": state, "save_seconds": 0.0})
    content = bytearray(state.read_bytes())
    content[int(place * len(content))] ^= 1
    state.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"training.safetensors: not (the state that the training left|a whole safetensors file)"):
        learned(made, "optimized_rotation", steps=5, batch_size=2, place={"state": state})


@pytest.mark.parametrize("step", [2, 5, 7, 9])
@pytest.mark.parametrize("name", ["optimized_scaling", "flatquant"])
def test_a_training_by_layer_goes_on_inside_or_between_layers(name, step, given, tmp_path, monkeypatch):
    made, state = given(VARIED[1]), tmp_path / "training.safetensors"
    _, whole = learned(made, name, steps=5, batch_size=2)
    with interrupted_at(step, monkeypatch):
        learned(made, name, steps=5, batch_size=2, place={"state": state, "save_seconds": 0.0})
    _, resumed = learned(made, name, steps=5, batch_size=2, place={"state": state, "save_seconds": 0.0})
    assert resumed.losses == whole.losses and resumed.ends == whole.ends
    assert all(torch.equal(resumed.transform.parameters[p], tensor) for p, tensor in whole.transform.parameters.items())
