"""Free forms, objectives, and training: it never ends worse than it began, also after an
interruption."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from torch.nn.functional import cross_entropy

from learned_cases import (
    HELD_OUT,
    LEARNED,
    NOTHING,
    OBJECTIVES,
    RATES,
    SPARSE,
    Interrupted,
    interrupted_at,
    learned,
    learned_values,
    logits_of,
    network,
    schemes,
    shaken,
    start,
)
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.learning import objectives
from quantgrid.learning.network import Folding, Network
from quantgrid.learning.objectives import AllLayers, EndToEnd, FourthPower, OneLayer, divided, squared_error
from quantgrid.learning.session import Session
from quantgrid.learning.trainables import Trainables, learned_kinds
from quantgrid.learning.training import Settings, train
from quantgrid.learning.training_context import TrainingContext
from quantgrid.models.plans import SITES
from reference_statistics import close
from selection import others_slow
from tiny_decoders import VARIED

# -- free forms ------------------------------------------------------------------------------------


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
    """At the published rate 0.0161: 2 sqrt(2) x 0.0161 in the Frobenius norm, where Adam on every
    entry turned 0.18, 2.0 and 5.2."""
    start = {"0.0.matrix": torch.eye(width, dtype=torch.float64)}
    trainables = Trainables(start, {"0.0.matrix": "rotation"})
    optimizer = trainables.optimizer({"rotation": 0.0161})
    loss = (
        trainables.values()["0.0.matrix"] * torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    ).sum()
    loss.backward()
    optimizer.step()
    turned = trainables.exported()["0.0.matrix"] - torch.eye(width, dtype=torch.float64)
    assert turned.norm().item() == pytest.approx(2 * math.sqrt(2) * 0.0161, rel=1e-3)


# -- objectives ------------------------------------------------------------------------------------


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
    teacher = made.logits.log_softmax(-1)
    student = logits_of(rounded, made.tokens[:2], values).double().log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    assert of(rounded, "kl_top") == pytest.approx(divergence.mean().item(), rel=1e-3)
    best, where = teacher.topk(5)
    assert of(rounded, "kl_top", 5) == pytest.approx(
        (best.exp() * (best - student.gather(-1, where))).sum(-1).mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("case", [VARIED[1], SPARSE, "OPTForCausalLM"], ids=str)
def test_the_layer_wise_error_vanishes_without_rounding(case, given):
    """Also where the transform removes the mean of the stream, behind LayerNorms."""
    made = given(case)
    begun = start(made, "optimized_rotation_scaling")
    values = learned_values(shaken(begun))
    exact, rounded = (
        sum(AllLayers(network(made, begun, wanted), HELD_OUT).pieces(values, [0, 1])).item()
        for wanted in (NOTHING, schemes())
    )
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
    assert (
        len(objective.compared) == HELD_OUT >= 16
        and drawn == set(range(objective.count))
        and not drawn & set(objective.compared)
    )
    with pytest.raises(ConfigError, match="16 held-out windows needs more than the given 16"):
        divided(16, 16)


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, name, options",
    others_slow(
        [(case, *objective) for case in (VARIED[1], SPARSE) for objective in OBJECTIVES],
        lambda case, *objective: case != SPARSE or objective == [*OBJECTIVES[3]],
    ),
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_training_does_not_end_worse_than_it_began(case, name, options, given):
    made = given(case)
    begun, done = learned(made, name, steps=12, batch_size=2, **options)
    assert done.ends and set(done.transform.parameters) == set(begun.parameters)
    parts = list(done.ends)
    layers = [str(layer) for layer in range(made.decoder.shape.layers)]
    assert parts == (layers if name in ("optimized_scaling", "flatquant") else ["all"])
    for part, end in done.ends.items():
        mine = [p for p in learned_kinds(begun) if part == "all" or p.split(".")[1] == part]
        same = all(torch.equal(done.transform.parameters[p], begun.parameters[p]) for p in mine)
        assert (end["kept"] == "learned") == (end["end"] < end["start"]) == (not same)
    rows = [line.split(",") for line in done.losses.splitlines()]
    assert rows[0] == ["part", "step", "loss", "learning_rate"]
    assert [(row[0], int(row[1])) for row in rows[1:]] == [(part, step) for part in parts for step in range(1, 13)]
    assert all(math.isfinite(float(row[2])) for row in rows[1:])


@pytest.mark.parametrize("case", others_slow([VARIED[1], SPARSE], lambda case: case != SPARSE), ids=str)
@pytest.mark.parametrize(
    "name, options",
    [
        ("optimized_rotation_scaling", {"objective": "layer_wise"}),
        ("optimized_scaling", {}),
        ("flatquant", {}),
        ("data_free_rotation", {}),
    ],
)
def test_training_lowers_the_loss(name, options, case, given):
    """Every part is learned; of a random model with experts, whose tokens are few, some may keep their start."""
    _, done = learned(given(case), name, steps=40, batch_size=2, **options)
    kept = [end["kept"] for end in done.ends.values()]
    assert kept.count("learned") >= (1 if case == SPARSE else len(kept))
    assert all(end["end"] < end["start"] for end in done.ends.values() if end["kept"] == "learned")


def test_a_start_that_is_better_is_kept(given):
    rates = {"learning_rate": 50.0, "scale_learning_rate": 3.0}
    begun, done = learned(given(VARIED[1]), "optimized_rotation_scaling", objective="layer_wise", steps=5, **rates)
    assert done.ends["all"]["kept"] == "start" and done.ends["all"]["end"] > done.ends["all"]["start"]
    assert all(torch.equal(done.transform.parameters[name], tensor) for name, tensor in begun.parameters.items())


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "data_free_rotation"])
def test_where_nothing_is_rounded_nothing_is_learned(name, given):
    begun, done = learned(given(VARIED[1]), name, NOTHING, steps=5)
    assert {end["kept"] for end in done.ends.values()} == {"untrained"} and done.losses.count("\n") == 1
    assert all(
        torch.equal(done.transform.parameters[parameter], tensor) for parameter, tensor in begun.parameters.items()
    )


def test_a_loss_that_is_not_finite_fails_the_cell():
    class Broken:
        count, compared = 2, [0]

        def pieces(self, values, batch):
            yield values["0.0.matrix"].sum() * (math.nan if torch.is_grad_enabled() else 1.0)

    start = {"0.0.matrix": torch.eye(3, dtype=torch.float64)}
    with pytest.raises(NumericalFailure, match="training of part 'all': the loss is not finite at step 1"):
        train(start, {"0.0.matrix": "rotation"}, Broken(), Settings(3, 1, RATES), Session(), "all", "cpu")


@pytest.mark.parametrize("schedule, wanted", [("cosine", [1, 0.75, 0.25]), ("linear", [1, 2 / 3, 1 / 3])])
def test_learning_rates_fall(schedule, wanted):
    assert [Settings(3, 1, RATES, schedule).factor(step) for step in range(3)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("warmup", "wanted"),
    [(0.0, [1, 3 / 4, 1 / 2, 1 / 4]), (0.05, [1 / 2, 1, 2 / 3, 1 / 3]), (0.5, [1 / 3, 2 / 3, 1, 1 / 2])],
)
def test_rates_rise_over_the_share_of_the_steps_and_over_one_at_least(warmup, wanted):
    settings = Settings(4, 1, RATES, "linear", warmup=warmup)
    assert [settings.factor(step) for step in range(4)] == pytest.approx(wanted)


def test_every_item_comes_before_any_comes_again():
    settings = Settings(6, 2, RATES, seed=3)
    drawn = [settings.batch(6, step) for step in range(6)]
    assert sorted(chain(*drawn[:3])) == sorted(chain(*drawn[3:])) == list(range(6)) and drawn[:3] != drawn[3:]
    assert settings.batch(6, 4) == drawn[4] and Settings(6, 2, RATES, seed=4).batch(6, 0) != drawn[0]
    assert sorted(Settings(2, 99, RATES).batch(3, 1)) == [0, 1, 2]


def test_what_is_compared_is_the_same_in_pieces(given, monkeypatch):
    """Windows held out are taken some at a time: the sum of their pieces is the loss of all at
    once."""
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation")
    net = network(made, begun, schemes(), round_weights=True)
    hidden = net.embedded(net.windows)
    wanted = net.full_precision_layer(0, hidden)
    for objective in (
        AllLayers(net, HELD_OUT),
        EndToEnd(net, HELD_OUT),
        *(OneLayer(net, HELD_OUT, 0, hidden, wanted, error) for error in ("squared", "relative")),
    ):
        found = []
        for piece in (1 << 20, 48):
            monkeypatch.setattr(objectives, "PIECE", piece)
            with torch.no_grad():
                found.append([value.item() for value in objective.pieces(learned_values(begun), objective.compared)])
        assert len(found[1]) > len(found[0]) and sum(found[1]) == pytest.approx(sum(found[0]), rel=1e-5)


# -- interruption ----------------------------------------------------------------------------------


def stopping(after: int):
    """A progress that raises after ``after`` items of all loops together."""
    left = [after]

    def wrap(items):
        for item in items:
            if not left[0]:
                raise Interrupted
            left[0] -= 1
            yield item

    return wrap


@pytest.mark.parametrize(
    "name, options, after",
    [
        ("optimized_rotation_scaling", {"objective": "layer_wise"}, 4),
        ("data_free_rotation", {}, 1),
        ("optimized_rotation", {"objective": "end_to_end"}, 7),
    ],
)
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(name, options, after, given, tmp_path):
    made, state = given(VARIED[1]), tmp_path / "training.safetensors"
    _, whole = learned(made, name, steps=8, batch_size=2, **options)
    with pytest.raises(Interrupted):
        learned(
            made,
            name,
            steps=8,
            batch_size=2,
            context={"state_file": state, "save_seconds": 0.0, "progress": stopping(after)},
            **options,
        )
    assert state.is_file()
    _, resumed = learned(
        made, name, steps=8, batch_size=2, context={"state_file": state, "save_seconds": 0.0}, **options
    )
    assert resumed.losses == whole.losses and resumed.ends == whole.ends
    assert all(torch.equal(resumed.transform.parameters[p], tensor) for p, tensor in whole.transform.parameters.items())


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"solver_dtype": "float32"}], ids=str)
def test_a_state_of_another_device_or_dtype_is_not_used(other, tmp_path, capsys):
    usual = {"device": "cpu", "solver_dtype": "float64", "state_file": tmp_path / "state", "save_seconds": 0.0}
    here, there = TrainingContext(tmp_path, **usual), TrainingContext(tmp_path, **{**usual, **other})
    Session.of(here).finish("0", {"a": torch.ones(2)}, 2.0, 1.0, True)
    assert Session.of(here).ends and not capsys.readouterr().err
    assert not Session.of(there).ends
    assert "starts over: it is of another device or dtype" in capsys.readouterr().err


def test_a_training_starts_over_behind_a_state_of_another_dtype(given, tmp_path, monkeypatch, capsys):
    made, context = given(VARIED[1]), {"state_file": tmp_path / "training.safetensors", "save_seconds": 0.0}
    options = {"steps": 4, "batch_size": 2}
    _, whole = learned(made, "data_free_rotation", **options)
    with interrupted_at(2, monkeypatch):
        learned(made, "data_free_rotation", context={**context, "solver_dtype": "float32"}, **options)
    _, again = learned(made, "data_free_rotation", context=context, **options)
    assert "the training starts over" in capsys.readouterr().err
    assert again.losses == whole.losses and again.ends == whole.ends


@pytest.mark.parametrize("place", [0.2, 0.9])
def test_a_damaged_state_is_refused(place, given, tmp_path, monkeypatch):
    """A flipped bit in the header or in a tensor."""
    made, state = given(VARIED[1]), tmp_path / "training.safetensors"
    with interrupted_at(3, monkeypatch):
        learned(made, "optimized_rotation", steps=5, batch_size=2, context={"state_file": state, "save_seconds": 0.0})
    content = bytearray(state.read_bytes())
    content[int(place * len(content))] ^= 1
    state.write_bytes(bytes(content))
    with pytest.raises(
        ConfigError, match=r"training.safetensors: (training state is altered|not a complete safetensors file)"
    ):
        learned(made, "optimized_rotation", steps=5, batch_size=2, context={"state_file": state})


@pytest.mark.parametrize("step", others_slow([2, 5, 7, 9], {5, 9}.__contains__))
@pytest.mark.parametrize("name", others_slow(["optimized_scaling", "flatquant"], {"flatquant"}.__contains__))
def test_a_training_by_layer_goes_on_inside_or_between_layers(name, step, given, tmp_path, monkeypatch):
    made, state = given(VARIED[1]), tmp_path / "training.safetensors"
    _, whole = learned(made, name, steps=5, batch_size=2)
    with interrupted_at(step, monkeypatch):
        learned(made, name, steps=5, batch_size=2, context={"state_file": state, "save_seconds": 0.0})
    _, resumed = learned(made, name, steps=5, batch_size=2, context={"state_file": state, "save_seconds": 0.0})
    assert resumed.losses == whole.losses and resumed.ends == whole.ends
    assert all(torch.equal(resumed.transform.parameters[p], tensor) for p, tensor in whole.transform.parameters.items())
