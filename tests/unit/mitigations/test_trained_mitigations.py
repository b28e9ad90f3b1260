"""Trained mitigations: stored scales and weights are those of the training, and the loss does not
rise above that of the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learned_cases import HELD_OUT, SPARSE, interrupted_at, loaded, recipe_of, same, schemes, trained
from mitigation_cases import SCHEMES, normal, weight_of
from quantgrid.ground.errors import NumericalFailure
from quantgrid.learning.learned_scales import NO_SHIFT, ScaledWeight
from quantgrid.learning.objectives import OneLayer, squared_error
from quantgrid.learning.straight_weight import StraightWeight
from quantgrid.learning.transformed import TransformedModel
from quantgrid.mitigations.methods.bases import solve_base
from quantgrid.mitigations.methods.layer_training import Block
from quantgrid.mitigations.methods.qat_finetune import Divergence, RoundedModel
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.quantizer import quantize
from quantgrid.quantizer.scales import effective_step
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from selection import others_slow
from tiny_decoders import VARIED

KINDS = ("tune_scales", "learned_rounding", "qat_finetune", "distill_blocks")


def perturbed(scaled: ScaledWeight) -> dict[str, torch.Tensor]:
    """Scales 3 to 13 % off their start, zero points by less than two codes."""
    start = scaled.start()
    drawn = {
        name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number))
        for number, (name, tensor) in enumerate(start.items())
    }
    return {"factor": 0.87 + 0.1 * drawn["factor"]} | (
        {"shift": NO_SHIFT + 0.1 * (drawn["shift"] - 0.5)} if "shift" in start else {}
    )


# -- learned scales --------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True], ids=["codes follow", "codes fixed"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_start_is_the_base_and_values_are_those_of_the_codes(name, fixed):
    weight = torch.stack([weight_of(), weight_of(5)])
    base = quantize(weight, SCHEMES[name])
    scaled = ScaledWeight(weight, base, fixed)
    begun = scaled.quantized(scaled.start())
    for part in ("codes", "scale", "zero_point", "codebook"):
        ours, theirs = getattr(begun, part), getattr(base, part)
        assert ours is theirs is None or torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), part
    for values in (scaled.start(), perturbed(scaled)):
        assert torch.equal(scaled.rounded(values), scaled.quantized(values).dequantize())
    assert fixed == torch.equal(
        scaled.quantized({**perturbed(scaled), "factor": torch.full(base.scale.shape, 0.4)}).codes, base.codes
    )


@pytest.mark.parametrize("fixed", [False, True], ids=["codes follow", "codes fixed"])
@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_differences_of_the_smooth_part(name, fixed):
    """s (clip(W / s) + c) in float64 numpy, c what rounding adds, moved a little along every scale
    and every zero point in turn.

    One factor is one number here: all blocks of a row are moved together, each with its weight,
    so that the sum of the gradients shows.
    """
    of_scheme, weight = SCHEMES[name], weight_of()
    scaled = ScaledWeight(weight, quantize(weight, of_scheme), fixed)
    values = {part: tensor.requires_grad_() for part, tensor in perturbed(scaled).items()}
    upstream = normal(*weight.shape, seed=7).float()
    scaled.rounded(values).backward(upstream)
    stored = scaled.quantized({part: tensor.detach() for part, tensor in values.items()})
    groups = stored.scale.shape[-1]

    def blocks(tensor):
        return tensor.double().unflatten(-1, (groups, -1)).numpy()

    def column(tensor):
        return tensor.double().unsqueeze(-1).numpy()

    w, step = blocks(weight), column(effective_step(stored.parameters, of_scheme))
    zero = 0.0 if stored.zero_point is None else column(stored.zero_point)
    shifted = name == "unsigned"
    units = (blocks(stored.dequantize()) - (zero if shifted else 0.0)) / np.where(step > 0, step, 1.0)
    element = of_scheme.element_format
    low, high = {
        "integer": of_scheme.code_range,
        "float": (-element.maximum * element.signed, element.maximum),
        "codebook": (-1.0, 1.0),
        "kmeans": (None, None),
    }[element.kind]
    if element.kind == "kmeans":
        low, high = (column(stored.codebook[..., end].float()) for end in (0, -1))

    def smooth(step, zero):
        code = 0.0 if shifted else zero
        if fixed:
            return step * (units + code0 - code) + (zero if shifted else 0.0)
        inside = np.clip((w - (zero if shifted else 0.0)) / np.where(step > 0, step, 1.0), low - code, high - code)
        return step * (inside + rest) + (zero if shifted else 0.0)

    code0 = 0.0 if shifted else zero
    rest = units - np.clip((w - (zero if shifted else 0.0)) / np.where(step > 0, step, 1.0), low - code0, high - code0)
    per_factor = column(effective_step(scaled.base.parameters, of_scheme))
    span = per_factor * of_scheme.limit if shifted else of_scheme.code_range[1] - of_scheme.code_range[0]
    small, weights = 1e-6, blocks(upstream)
    for part, ways in (("factor", (per_factor, 0.0)), ("shift", (0.0, span))):
        if part in values:
            difference = sum(
                sign * smooth(step + sign * small * ways[0], zero + sign * small * ways[1]) for sign in (1, -1)
            ) / (2 * small)
            wanted = torch.from_numpy((difference * weights).sum(-1))
            wanted = wanted if stored.scale.shape[-2] > 1 else wanted.sum(-2, keepdim=True)
            assert (values[part].grad - wanted).abs().max() <= 2e-3 * wanted.abs().max(), part
            assert wanted.abs().max() > 0


def test_the_gradient_of_a_symmetric_scale_is_that_of_lsq():
    """round(w / s) - w / s where w / s is in range, the limit that it is clipped to elsewhere
    (arXiv 1902.08153, equation 3)."""
    weight = torch.tensor([[7.0, 2.4, -1.2, 0.3, -9.0]])
    scaled = ScaledWeight(weight, quantize(torch.tensor([[7.0, 0, 0, 0, 0]]), scheme("int4_sym")))
    factor = torch.tensor([[0.8]], requires_grad=True)
    for item, wanted in enumerate([7.0, 3 - 3.0, -2 + 1.5, 0 - 0.375, -8.0]):
        factor.grad = None
        scaled.rounded({"factor": factor})[0, item].backward()
        assert factor.grad.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("factor, exponents", [(1.0, 0), (1.3, 0), (1.5, 1), (0.72, 0), (0.69, -1), (4.1, 2)])
def test_powers_of_two_go_to_the_nearest(factor, exponents):
    weight = weight_of()
    scaled = ScaledWeight(weight, quantize(weight, scheme("mxfp4")))
    found = scaled.quantized({"factor": torch.full(scaled.base.scale.shape, factor)})
    assert torch.equal(found.scale.int(), scaled.base.scale.int() + exponents)


# -- the model that is trained ---------------------------------------------------------------------


@pytest.mark.parametrize("case", [*VARIED[1:4], SPARSE], ids=str)
def test_without_rounding_the_transformed_model_is_the_model(case, given):
    made = given(case)
    model = TransformedModel(recipe_of(made), made.context(), "range")
    hidden = model.embedded()
    for index in range(len(model.layers)):
        hidden = model.advance(index, hidden)
    found = model.network.lm_head(model.network.model.norm(hidden[:2])).double()
    # embeddings are bfloat16, as they are stored
    assert (found - made.logits).norm() < 2e-2 * made.logits.norm()


@pytest.mark.parametrize("case", [VARIED[1], SPARSE], ids=str)
@pytest.mark.parametrize(
    "entry",
    [
        {"preset": "int4", "key_value": {"rotate_keys": True}},
        {"preset": "nvfp4", "activation": {"global_scale": "static"}},
    ],
    ids=["keys and values", "static"],
)
def test_gradients_reach_every_scale_and_every_weight(entry, case, given):
    """In two windows, and in one, every expert gets a token."""
    made = given(case)
    wanted = CellSchemes.from_dict(
        cell_schemes(entry, "group-16" if entry["preset"] == "nvfp4" else "channel", "test", 16)
    )
    model = TransformedModel(recipe_of(made, wanted), made.context(), "range")
    weights = model.weights(model.folded(0))
    block = Block(
        model, 0, {linear: ScaledWeight(weight, quantize(weight, wanted.weight)) for linear, weight in weights.items()}
    )
    values = {name: tensor.requires_grad_() for name, tensor in block.start().items()}
    hidden = model.embedded()
    sum(OneLayer(block, HELD_OUT, 0, hidden, model.advance(0, hidden), "squared").pieces(values, [0, 1])).backward()
    assert all(tensor.grad.abs().max() > 0 and torch.isfinite(tensor.grad).all() for tensor in values.values())
    learned = {
        f"{index}.{linear}": StraightWeight.of(weight, rtn(weight, None, wanted.weight), "rtn", "range")
        for index in range(len(model.layers))
        for linear, weight in model.weights(model.folded(index)).items()
    }
    start = {name: straight.weight.requires_grad_() for name, straight in learned.items()}
    network = RoundedModel(model, learned)
    sum(Divergence(network, HELD_OUT, load_full_precision(made.folder)).pieces(start, [0])).backward()
    assert all(tensor.grad.abs().max() > 0 and torch.isfinite(tensor.grad).all() for tensor in start.values())


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, base, case",
    others_slow(
        [(method, base, case) for method in KINDS for base in ("rtn", "gptq") for case in (VARIED[1], SPARSE)],
        lambda method, base, case: base == "gptq" and (case != SPARSE or method == "tune_scales"),
    ),
    ids=str,
)
def test_no_step_leaves_the_base(method, base, case, given):
    made = given(case)
    found = trained(made, method, steps=0, base=base)
    recipe = recipe_of(made)

    def solve(*given):
        return solve_base(base, *given)

    wanted = quantize_decoder(made.decoder, Recipe(recipe.transform, recipe.schemes, solve, recipe.statistics_file))
    assert same(found.quantized.content.tensors, wanted.content.tensors)
    assert found.quantized.errors.keys() == wanted.errors.keys() and found.quantized.costs == wanted.costs
    assert {end["kept"] for end in found.ends.values()} == {"untrained"} and found.losses.count("\n") == 1


SCALES, CODES, WEIGHTS = "tune_scales", "learned_rounding", "distill_blocks"


@pytest.mark.parametrize(
    "method, preset, granularity, base, rate, case",
    [
        (SCALES, "int4", "channel", "rtn", 5e-3, VARIED[1]),
        (SCALES, "int4_asym", "group-32", "gptq", 5e-3, VARIED[1]),
        (SCALES, "mxfp4", "group-32", "rtn", 2e-2, VARIED[1]),
        (CODES, "int4_asym", "group-32", "rtn", 2e-2, VARIED[1]),
        (CODES, "mxfp4", "group-32", "rtn", 2e-2, VARIED[1]),
        (WEIGHTS, "nvfp4", "group-16", "gptq", 1e-4, VARIED[1]),
        pytest.param(SCALES, "nvfp4", "group-16", "rtn", 5e-3, VARIED[1], marks=pytest.mark.slow),
        pytest.param(WEIGHTS, "int4_asym", "group-32", "rtn", 1e-3, VARIED[1], marks=pytest.mark.slow),
        pytest.param(SCALES, "int4", "channel", "rtn", 5e-3, SPARSE, marks=pytest.mark.slow),
        pytest.param(SCALES, "int4_asym", "group-16", "gptq", 5e-3, SPARSE, marks=pytest.mark.slow),
        pytest.param(CODES, "int4", "channel", "rtn", 2e-2, SPARSE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_end_no_worse_and_the_checkpoint_has_their_error(
    method, preset, granularity, base, rate, case, given, tmp_path
):
    """The recorded error of every layer is that of the loaded checkpoint against the full-precision
    stream, on the windows held out."""
    made, wanted = given(case), schemes(preset, granularity)
    done = trained(made, method, wanted, base=base, steps=24, learning_rate=rate)
    assert all((end["kept"] == "learned") == (end["end"] < end["start"]) for end in done.ends.values())
    assert done.ends["0"]["kept"] == "learned"
    outputs, quantized = [], loaded(done, tmp_path)
    for layer in quantized.model.layers:
        layer.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        quantized(made.tokens)
    model = TransformedModel(recipe_of(made, wanted), made.context(), "range")
    exact = model.embedded()
    for index, found in enumerate(outputs):
        exact, end = model.advance(index, exact), done.ends[str(index)]
        assert squared_error(found[-HELD_OUT:], exact[-HELD_OUT:], "squared").item() == pytest.approx(
            min(end["start"], end["end"]), rel=2e-3
        )
        rows = [float(line.split(",")[2]) for line in done.losses.splitlines()[1:] if line.startswith(f"{index},")]
        assert len(rows) == 24


@pytest.mark.parametrize(
    "case, transform, preset, loss",
    [
        *(
            (VARIED[1], *of, loss)
            for of in (("hadamard", "int4"), ("none", "mxfp4"))
            for loss in ("kl", "cross_entropy")
        ),
    ],
    ids=str,
)
def test_qat_lowers_the_loss_and_the_checkpoint_has_it(case, transform, preset, loss, given, tmp_path):
    made = given(case)
    wanted = schemes(preset, "group-32" if preset == "mxfp4" else "channel")
    done = trained(made, "qat_finetune", wanted, transform=transform, loss=loss, steps=8, learning_rate=3e-4)
    end = done.ends["all"]
    assert (
        end["kept"] == "learned" and end["end"] < (0.97 if loss == "kl" else 1.0) * end["start"]
    )  # on windows that were not trained on
    with torch.no_grad():
        found = loaded(done, tmp_path)(made.tokens[-HELD_OUT:]).logits.log_softmax(-1)
        target = load_full_precision(made.folder)(made.tokens[-HELD_OUT:]).logits.log_softmax(-1)
    divergence, entropy = (
        (target.exp() * (target - found)).sum(-1).mean(),
        -found[:, :-1].gather(-1, made.tokens[-HELD_OUT:, 1:, None]).mean(),
    )
    value = divergence if loss == "kl" else entropy
    assert value.item() == pytest.approx(end["end"], rel=2e-3)


@pytest.mark.slow
def test_qat_lowers_the_loss_of_the_windows_that_it_trains_experts_on(given, tmp_path):
    """Random tokens have nothing in common with those held out, on which the start may be kept."""
    made = given(SPARSE)
    done = trained(made, "qat_finetune", loss="kl", steps=24, learning_rate=1e-3, batch_size=4)
    losses = [float(line.split(",")[2]) for line in done.losses.splitlines()[1:]]
    assert sum(losses[-6:]) < 0.75 * sum(losses[:6])
    with torch.no_grad():
        found = loaded(done, tmp_path)(made.tokens[-HELD_OUT:]).logits.log_softmax(-1)
        target = load_full_precision(made.folder)(made.tokens[-HELD_OUT:]).logits.log_softmax(-1)
    end = done.ends["all"]
    divergence = (target.exp() * (target - found)).sum(-1).mean().item()
    assert divergence == pytest.approx(min(end["start"], end["end"]), rel=2e-3)


@pytest.mark.parametrize("name", others_slow(KINDS, lambda name: name != "distill_blocks"))
def test_a_start_that_is_better_is_kept(name, given):
    made = given(VARIED[1])
    done, begun = (trained(made, name, steps=steps, learning_rate=2.0) for steps in (2, 0))
    assert {end["kept"] for end in done.ends.values()} == {"start"} and same(
        done.quantized.content.tensors, begun.quantized.content.tensors
    )


@pytest.mark.parametrize("name", others_slow(KINDS, lambda name: name == "learned_rounding"))
def test_the_seed_decides(name, given):
    made = given(VARIED[1])
    one, other, third = (trained(made, name, steps=3, seed=seed) for seed in (0, 0, 1))
    assert (
        same(one.quantized.content.tensors, other.quantized.content.tensors)
        and one.losses == other.losses
        and one.ends == other.ends
    )
    assert one.losses != third.losses


@pytest.mark.parametrize(
    "name, step, options",
    others_slow(
        [
            ("tune_scales", 2, {}),
            ("tune_scales", 5, {}),
            ("learned_rounding", 5, {}),
            ("qat_finetune", 2, {"checks": 3, "learning_rate": 3e-4, "warmup": 0.4}),
        ],
        lambda name, step, options: name != "tune_scales",
    ),
    ids=str,
)
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(name, step, options, given, tmp_path, monkeypatch):
    made, context = given(VARIED[1]), {"state_file": tmp_path / "training.safetensors", "save_seconds": 0.0}
    whole = trained(made, name, steps=3, **options)
    with interrupted_at(step, monkeypatch):
        trained(made, name, steps=3, context=context, **options)
    resumed = trained(made, name, steps=3, context=context, **options)
    assert resumed.losses == whole.losses and resumed.ends == whole.ends
    assert same(resumed.quantized.content.tensors, whole.quantized.content.tensors)


def test_a_loss_that_is_not_finite_fails_the_cell(given, monkeypatch):
    monkeypatch.setattr(
        Divergence, "pieces", lambda self, values, batch: iter([next(iter(values.values())).sum() * float("nan")])
    )
    with pytest.raises(NumericalFailure, match="training of part 'all': the loss is not finite at step 1"):
        trained(given(VARIED[1]), "qat_finetune", steps=2)
