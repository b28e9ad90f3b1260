"""Trained mitigations: stored scales and weights are those of the training, and the loss does not
rise above that of the start."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from learned_cases import HELD_OUT, SPARSE, Given, interrupted_at, schemes
from mitigation_cases import SCHEMES, normal, weight_of
from quantgrid.config import check, grid, registry
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.inference.transform import fit
from quantgrid.learning.learned_scales import NO_SHIFT, ScaledWeight
from quantgrid.learning.objectives import OneLayer, squared_error
from quantgrid.learning.transformed import Trained, TransformedModel
from quantgrid.mitigations.methods.bases import solve_base
from quantgrid.mitigations.methods.qat_finetune import Divergence, RoundedModel
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.tune_scales import Block
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_full_precision, load_quantized, save_quantized
from quantgrid.quantizer import quantize
from quantgrid.quantizer.scales import effective_step
from quantgrid.reporting.page import page_context, report
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.transforms.recipes import random_hadamard
from selection import others_slow
from tiny_decoders import VARIED

KINDS = ("tune_scales", "qat_finetune")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return cache(lambda case: Given.make(tmp_path_factory.mktemp("case"), case))


def recipe_of(made: Given, wanted: CellSchemes | None = None, transform: str = "hadamard") -> Recipe:
    fitted = fit(
        random_hadamard.primitives(1) if transform == "hadamard" else [], made.decoder, made.folder / "statistics"
    )
    return Recipe(fitted, wanted or schemes(), None, str(made.folder / "statistics"))


def trained(
    made: Given,
    name: str,
    wanted: CellSchemes | None = None,
    context: dict[str, Any] | None = None,
    seed: int = 0,
    transform: str = "hadamard",
    **options: Any,
) -> Trained:
    method = registry.method("mitigations", name)
    resolved = method.resolve({"method": name, "batch_size": 2, **options}, name)["options"]
    return getattr(registry.load("mitigations", name), name)(
        recipe_of(made, wanted, transform), made.context(**(context or {})), seed=seed, **resolved
    )


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


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
    start = {
        f"{index}.{linear}": weight[0].requires_grad_()
        for index in range(len(model.layers))
        for linear, weight in model.weights(model.folded(index)).items()
    }
    sum(Divergence(RoundedModel(model), HELD_OUT, load_full_precision(made.folder)).pieces(start, [0])).backward()
    assert all(tensor.grad.abs().max() > 0 and torch.isfinite(tensor.grad).all() for tensor in start.values())


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", others_slow([VARIED[1], SPARSE], lambda case: case == SPARSE), ids=str)
@pytest.mark.parametrize("base", others_slow(["rtn", "gptq", "qat_finetune"], {"gptq", "qat_finetune"}.__contains__))
def test_no_step_leaves_the_base(base, case, given):
    made = given(case)
    method, options = (base, {}) if base == "qat_finetune" else ("tune_scales", {"base": base})
    found = trained(made, method, steps=0, **options)
    recipe = recipe_of(made)
    solve = rtn if base == "qat_finetune" else lambda *given: solve_base(base, *given)
    wanted = quantize_decoder(made.decoder, Recipe(recipe.transform, recipe.schemes, solve, recipe.statistics_file))
    assert same(found.quantized.content.tensors, wanted.content.tensors)
    assert found.quantized.errors.keys() == wanted.errors.keys() and found.quantized.costs == wanted.costs
    assert {end["kept"] for end in found.ends.values()} == {"untrained"} and found.losses.count("\n") == 1


def loaded(done: Trained, folder):
    save_quantized(done.quantized.content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
    return load_quantized(folder)


@pytest.mark.parametrize(
    "preset, granularity, base, rate, case",
    [
        ("int4", "channel", "rtn", 5e-3, VARIED[1]),
        ("int4_asym", "group-32", "gptq", 5e-3, VARIED[1]),
        ("mxfp4", "group-32", "rtn", 2e-2, VARIED[1]),
        ("nvfp4", "group-16", "rtn", 5e-3, VARIED[1]),
        pytest.param("int4", "channel", "rtn", 5e-3, SPARSE, marks=pytest.mark.slow),
        pytest.param("int4_asym", "group-16", "gptq", 5e-3, SPARSE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_end_no_worse_and_the_checkpoint_has_their_error(preset, granularity, base, rate, case, given, tmp_path):
    """The recorded error of every layer is that of the loaded checkpoint against the full-precision
    stream, on the windows held out."""
    made, wanted = given(case), schemes(preset, granularity)
    done = trained(made, "tune_scales", wanted, base=base, steps=24, learning_rate=rate)
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


@pytest.mark.parametrize("name", KINDS)
def test_a_start_that_is_better_is_kept(name, given):
    made = given(VARIED[1])
    done, begun = (trained(made, name, steps=steps, learning_rate=2.0) for steps in (2, 0))
    assert {end["kept"] for end in done.ends.values()} == {"start"} and same(
        done.quantized.content.tensors, begun.quantized.content.tensors
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_seed_decides(name, given):
    made = given(VARIED[1])
    one, other, third = (trained(made, name, steps=3, seed=seed) for seed in (0, 0, 1))
    assert (
        same(one.quantized.content.tensors, other.quantized.content.tensors)
        and one.losses == other.losses
        and one.ends == other.ends
    )
    assert one.losses != third.losses


@pytest.mark.parametrize("name, step", [("tune_scales", 2), ("tune_scales", 5), ("qat_finetune", 2)])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(name, step, given, tmp_path, monkeypatch):
    made, context = given(VARIED[1]), {"state_file": tmp_path / "training.safetensors", "save_seconds": 0.0}
    whole = trained(made, name, steps=3)
    with interrupted_at(step, monkeypatch):
        trained(made, name, steps=3, context=context)
    resumed = trained(made, name, steps=3, context=context)
    assert resumed.losses == whole.losses and resumed.ends == whole.ends
    assert same(resumed.quantized.content.tensors, whole.quantized.content.tensors)


def test_a_loss_that_is_not_finite_fails_the_cell(given, monkeypatch):
    monkeypatch.setattr(
        Divergence, "pieces", lambda self, values, batch: iter([next(iter(values.values())).sum() * float("nan")])
    )
    with pytest.raises(NumericalFailure, match="training of part 'all': the loss is not finite at step 1"):
        trained(given(VARIED[1]), "qat_finetune", steps=2)


# -- what is refused, what is marked ---------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_unrounded_weights_are_refused(name, given):
    activation = {site: [activation_scheme("int8")] for site in ("mlp_input",)}
    with pytest.raises(ConfigError, match="nothing to train"):
        trained(given(VARIED[1]), name, CellSchemes(None, activation))


def config_of(mitigation: dict[str, Any], format: dict[str, Any]) -> dict[str, Any]:
    return {
        "models": {
            "tiny": {
                "source": "hub",
                "id": "a/b",
                "revision": "main",
                "shape": {
                    "architecture": "LlamaForCausalLM",
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "layers": 2,
                    "heads": 4,
                    "kv_heads": 2,
                    "head_dim": 16,
                    "vocabulary": 100,
                },
            }
        },
        "corpora": {
            "text": {"source": "builtin", "part": "calibration", "window": 64, "windows": 20},
            "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 4},
        },
        "calibrations": {"default": {"corpus": "text"}},
        "mitigations": {"mine": mitigation},
        "formats": {"chosen": format},
        "evaluate": {"perplexity": ["docs"]},
        "studies": {
            "one": {
                "models": ["tiny"],
                "transforms": ["none"],
                "mitigations": ["mine"],
                "granularities": ["channel"],
                "formats": ["chosen"],
            }
        },
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_config_that_trains_unrounded_weights_is_refused_by_name(name):
    assert grid.expand_studies(check(config_of({"method": name}, {"preset": "int4"})))
    with pytest.raises(
        ConfigError,
        match=r"mitigation 'mine' trains the rounding of weights, and format 'chosen' .* use a format that rounds",
    ):
        check(config_of({"method": name}, {"preset": "int4", "weight": None}))


@pytest.mark.parametrize("base", ["rtn", "gptq", "mr_gptq"])
def test_fixed_codes_under_powers_of_two_are_refused_by_name(base):
    config = config_of({"method": "tune_scales", "base": base}, {"preset": "mxfp4"})
    config["studies"]["one"]["granularities"] = ["native"]
    if base == "rtn":
        assert check(config)
    else:
        with pytest.raises(ConfigError, match=f"keeps the codes of '{base}' .* format 'chosen' are powers of two"):
            check(config)


def test_options_of_the_bases_are_theirs():
    with pytest.raises(ConfigError, match=r"mitigations\.mine\.damping"):
        check(config_of({"method": "tune_scales", "damping": 0.1}, {"preset": "int4"}))
    assert check(config_of({"method": "tune_scales", "base": "gptq", "damping": 0.1}, {"preset": "int4"}))


@pytest.mark.parametrize(
    "axis, entry",
    [
        ("mitigations", {"method": "qat_finetune"}),
        ("mitigations", {"method": "tune_scales", "held_out": 19}),
        ("transforms", {"method": "flatquant"}),
        ("transforms", {"method": "optimized_rotation"}),
    ],
)
def test_a_corpus_too_short_to_hold_windows_out_is_refused_at_planning(axis, entry):
    config = config_of({"method": "rtn"}, {"preset": "int4"})
    config[axis] = {"mine": entry}
    config["studies"]["one"][axis] = ["mine"]
    config["corpora"]["text"]["windows"] = held_out = entry.get("held_out", 16)
    with pytest.raises(
        ConfigError,
        match=rf"{axis}.mine: .* holds {held_out} out, and corpus 'text' has {held_out}; set its 'windows' to at least",
    ):
        check(config)
    config["corpora"]["text"]["windows"] = held_out + 8
    assert check(config)
    # as many as the text has, which tokenizing alone can know
    del config["corpora"]["text"]["windows"]
    assert check(config)
    with pytest.raises(ConfigError, match=rf"{axis}.mine.held_out: 4 is out of range"):
        check({**config, axis: {"mine": {**entry, "held_out": 4}}})


def test_training_is_marked():
    marked = {name: method.training for name, method in registry.MITIGATIONS.items() if method.training}
    assert marked == {"tune_scales": "scales", "qat_finetune": "weights"} and all(
        registry.MITIGATIONS[name].seeded for name in marked
    )
    found = page_context.trained(
        check(config_of({"method": "qat_finetune", "steps": 7, "seeds": [0, 1]}, {"preset": "int4"}))
    )
    assert found == [{"mitigation": "mine", "method": "qat_finetune", "trained": "weights", "steps": 7}]
    untrained = page_context.trained(check(config_of({"method": "rtn"}, {"preset": "int4"})))
    shown, bare = (report.build([], {"training": rows}) for rows in (found, untrained))
    assert (
        "is not post-training quantization" in shown
        and "<td>weights</td>" in shown.replace(" ", "")
        and "Trained mitigations" not in bare
    )
