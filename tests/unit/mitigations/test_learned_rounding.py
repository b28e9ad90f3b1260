"""Learned rounding: its arithmetic against the published formula in plain loops, its start, and its bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learned_cases import recipe_of, same, schemes, trained
from mitigation_cases import SCHEMES, inputs, weight_of
from quantgrid.calibration.sensitivity import measure_sensitivities
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.places import ROOT
from quantgrid.ground.storage import write_json
from quantgrid.learning.learned_codes import RoundedWeight, in_cells
from quantgrid.learning.trainables import Free, SignDescent
from quantgrid.learning.training import Settings
from quantgrid.learning.transformed import TransformedModel
from quantgrid.mitigations.methods.bases import solve_base
from quantgrid.quantization.checkpoints import load_full_precision
from quantgrid.quantizer import quantize
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from reference_statistics import statistics_of
from tiny_decoders import VARIED

VECTORS = ROOT / "tests" / "data" / "auto-round-vectors.safetensors"
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = np.concatenate([-E2M1[:0:-1], E2M1])


def published(weight, offset, factor):
    """SignRound on INT4 per channel (arXiv 2309.05516): s clip(round(W / s + V), -8, 7), s the shrunk
    range over 7."""
    step = factor * np.abs(weight).max(-1, keepdims=True) / 7
    return step * np.clip(np.round(weight / step + offset), -8, 7), step


def on_e2m1(weight, offset, step):
    """Nearest value to W / s + V d, with d the distance of the values around W / s, one element at a time."""
    found = np.empty_like(weight)
    for place, value in np.ndenumerate(weight / step):
        above = min(max(int(np.searchsorted(E2M1, value, side="right")), 1), len(E2M1) - 1)
        moved = value + offset[place] * (E2M1[above] - E2M1[above - 1])
        found[place] = E2M1[np.abs(E2M1 - moved).argmin()]
    return found * step


def fixed(seed=0):
    """(weight (m, n), offsets, factors (m, 1)) in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = weight_of(seed)
    offset = torch.rand(weight.shape, generator=generator) - 0.5
    return weight, offset, 0.7 + 0.3 * torch.rand(len(weight), 1, generator=generator)


def test_values_are_those_of_the_published_formula():
    weight, offset, factor = fixed()
    rounded = RoundedWeight(weight, quantize(weight, scheme("int4_sym")))
    found = rounded.rounded({"offset": offset, "factor": factor})
    wanted, step = published(weight.double().numpy(), offset.double().numpy(), factor.double().numpy())
    assert np.abs(found.double().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    moved = np.abs(wanted - published(weight.double().numpy(), 0.0, factor.double().numpy())[0]) / step
    assert 0.1 < (moved > 0.5).mean() < 0.9 and moved.max() < 1.01


def test_offsets_on_floats_count_in_code_distances():
    weight, offset, _ = fixed()
    rounded = RoundedWeight(weight, quantize(weight, scheme("fp4")), ranges=False)
    found = rounded.rounded({"offset": offset}).double().numpy()
    step = np.abs(weight.double().numpy()).max(-1, keepdims=True) / 6
    assert (
        np.abs(found - on_e2m1(weight.double().numpy(), offset.double().numpy(), step)).max()
        < 1e-5 * np.abs(found).max()
    )


def relative_factor(name, base, vectors):
    """Factor (m, groups) of our scales that gives those of AutoRound. Its factor multiplies the scale before the
    first rounding to E4M3, ours the rounded one."""
    if name != "nvfp4":
        return vectors.get(f"{name}.factor")
    largest = vectors["weight"].unflatten(-1, (base.scale.shape[-1], -1)).abs().amax(-1)
    return vectors["nvfp4.factor"] * largest / 6 / (base.scale.float() * base.global_scale)


@pytest.mark.parametrize("name, key", [("int4", "int4_sym"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4")])
def test_values_and_derivatives_are_those_of_autoround(name, key):
    """``tests/record_auto_round_vectors.py`` ran its ``quant_tensor_sym``, ``nv_fp4`` and ``quant_mx`` on these
    offsets, in units of the scale. Ours are in code distances, so each is divided by the distance around W / s."""
    vectors = load_file(VECTORS)
    weight, offset, values = vectors["weight"], vectors["offset"], vectors[f"{name}.values"]
    base = quantize(weight, scheme(key))
    rounded, factor = RoundedWeight(weight, base), relative_factor(name, base, vectors)
    theirs = vectors[f"{name}.scale"]
    if name == "mxfp4":
        theirs = theirs.exp2()
    step = (theirs if base.global_scale is None else theirs * base.global_scale).double().numpy()
    units = weight.double().numpy() / np.repeat(step, weight.shape[1] // step.shape[1], -1)
    distance = np.ones_like(units)
    if name != "int4":
        above = np.clip(np.searchsorted(E2M1, units, side="right"), 1, len(E2M1) - 1)
        distance = E2M1[above] - E2M1[above - 1]
    distance = torch.from_numpy(distance).float()
    ours = {"offset": (offset / distance).requires_grad_()} | ({} if factor is None else {"factor": factor})
    found = rounded.rounded(ours)
    assert torch.allclose(found, values, rtol=1e-5, atol=0.0)
    assert (found - base.dequantize()).abs().gt(0).float().mean() > 0.2
    found.sum().backward()
    wanted, moved = vectors[f"{name}.gradient"] * distance, units + offset.numpy()
    if name == "int4":  # its derivative ends where the code is clipped, half a code beyond ours
        beyond = torch.from_numpy((moved > 7) & (moved < 7.5) | (moved < -8) & (moved > -8.5))
        assert beyond.any() and not ours["offset"].grad[beyond].any() and bool(wanted[beyond].all())
        wanted = wanted.masked_fill(beyond, 0.0)
    if name == "mxfp4":  # its power of two of each value is differentiable too, and only the sign counts
        assert torch.equal(ours["offset"].grad.sign(), wanted.sign())
    else:
        assert torch.allclose(ours["offset"].grad, wanted, rtol=1e-5)


def test_steps_are_those_of_the_published_descent():
    """One linear, squared output error, derivatives by hand: dŴ/dV = s where W / s + V is in range, dŴ/db =
    s / b (code - W / s) there and s / b times the limit elsewhere."""
    weight, x = weight_of(), inputs().numpy()
    moment, w = x.T @ x / len(x), weight.double().numpy()
    rounded, settings = RoundedWeight(weight, quantize(weight, scheme("int4_sym"))), Settings(20, 1, {}, "linear")
    # ranges a little shrunk: at the full range the largest weight is in range or not by the last bit
    free = Free({**rounded.start(), "factor": torch.full((len(weight), 1), 0.93)}, rounded.bounds())
    optimizer = SignDescent([{"params": list(free.parameters()), "lr": 0.0}])
    optimizer.register_step_post_hook(lambda *_: free.confine())
    offset, factor = np.zeros_like(w), np.full((len(w), 1), 0.93)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = rate = 0.02 * settings.factor(step)
        optimizer.zero_grad()
        error = rounded.rounded(free.values()) - weight
        ((error.double() @ torch.from_numpy(moment)) * error).sum().backward()
        optimizer.step()

        wanted, s = published(w, offset, factor)
        upstream, units = 2 * (wanted - w) @ moment, w / s + offset
        inside = (units >= -8) & (units <= 7)
        by_factor = upstream * np.where(inside, wanted / s - w / s, np.clip(units, -8, 7)) * s / factor
        offset = offset - rate * np.sign(upstream * inside)
        factor = np.minimum(factor - rate * np.sign(by_factor.sum(-1, keepdims=True)), 1.0)
        found = free.values()
        assert (np.abs(found["offset"].detach().numpy() - offset) > 1e-6).mean() < 1e-3  # signs of rounding errors
        assert np.abs(found["factor"].detach().numpy() - factor).max() < 1e-6
    assert np.abs(offset).max() > 0.1 and factor.min() < 0.9 and factor.max() > 0.96


def test_an_offset_reaches_half_a_code():
    rates = [0.005 * Settings(200, 8, {}, "linear").factor(step) for step in range(200)]
    assert sum(rates) == pytest.approx(201 / 400)


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_start_has_the_codes_of_the_base(name, base, ranges):
    weight, of_scheme = weight_of(), SCHEMES[name]
    solved = solve_base(base, weight, statistics_of(inputs()), of_scheme)
    moved = in_cells(weight, solved)
    rounded = RoundedWeight(moved, solved.quantized, ranges=ranges)
    begun = rounded.quantized(rounded.start())
    assert torch.equal(begun.dequantize(), solved.dequantized())
    assert torch.equal(rounded.rounded(rounded.start()), solved.dequantized())
    stays = quantize(weight, of_scheme, solved.quantized.parameters).dequantize() == solved.dequantized()
    assert torch.equal(moved[stays], weight[stays]) and (base == "gptq" or bool(stays.all()))
    # moved towards the code, and no farther than to the code
    nearer = (moved - solved.dequantized()).abs() < (weight - solved.dequantized()).abs()
    assert bool(nearer[~stays].all()) and bool((((weight - moved) * (moved - solved.dequantized()))[~stays] >= 0).all())


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "fp4", "nf4"])
def test_no_offset_in_reach_moves_a_code_by_more_than_one(name, base):
    """Codes in the order of their values, which is that of bit patterns for all but floats."""
    weight, of_scheme = weight_of(), SCHEMES[name]
    solved = solve_base(base, weight, statistics_of(inputs()), of_scheme)
    rounded = RoundedWeight(in_cells(weight, solved), solved.quantized, ranges=False)
    offset = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) * 1.005 - 0.5025
    before, after = (found.codes.long() for found in (solved.quantized, rounded.quantized({"offset": offset})))
    if of_scheme.element_format.kind == "float":
        before, after = (torch.where(codes > 7, 8 - codes, codes) for codes in (before, after))
    moved = (before - after).abs()
    assert moved.max() == 1 and 0.15 < (moved == 1).float().mean() < 0.35  # 1/4 of uniform fractions


@pytest.mark.parametrize("name", SCHEMES)
def test_first_steps_leave_the_codes_that_a_weight_was_moved_to(name):
    """A step of AutoRound moves every offset by the learning rate. Codes of GPTQ that rounding to nearest
    does not give outlast many of them."""
    weight, of_scheme = weight_of(), SCHEMES[name]
    solved = solve_base("gptq", weight, statistics_of(inputs()), of_scheme)
    moved = in_cells(weight, solved)
    there = moved != weight
    assert bool(there.any())
    rounded = RoundedWeight(moved, solved.quantized, ranges=False)
    for offset in (-0.2, 0.2):
        stepped = rounded.rounded({"offset": torch.full_like(weight, offset)})
        assert torch.equal(stepped[there], solved.dequantized()[there])


def test_powers_of_two_are_not_trained(given):
    """The exponents are those of the base, and the training is that without ranges, number by number."""
    made, of_scheme = given(VARIED[1]), schemes("mxfp4", "group-32")
    with_ranges, without = (
        trained(made, "learned_rounding", of_scheme, steps=8, learning_rate=1 / 8, **options)
        for options in ({}, {"ranges": False})
    )
    assert with_ranges.losses == without.losses and with_ranges.ends == without.ends
    assert any(end["kept"] == "learned" for end in without.ends.values())
    assert same(*(done.quantized.content.tensors for done in (with_ranges, without)))


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "nvfp4", "mxfp4 asymmetric"])
def test_other_ranges_are_trained(name):
    """Factors and shifts get gradients that are not zero; the shift of an asymmetric range does so under powers
    of two as well."""
    of_scheme = SCHEMES.get(name) or scheme("mxfp4", element="int4", symmetric=False)
    weight = weight_of()
    rounded = RoundedWeight(weight, quantize(weight, of_scheme))
    parts = {part: tensor.requires_grad_() for part, tensor in rounded.start().items()}
    has = {"offset": True, "factor": name != "mxfp4 asymmetric", "shift": not of_scheme.symmetric}
    wanted = {part for part, there in has.items() if there}
    assert parts.keys() == wanted and rounded.bounds().keys() == wanted - {"offset"}
    rounded.rounded(parts).square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in parts.values())


def sensitivities(folder, channels):
    """Context with a file of sensitivities whose channels (layers, d) are ``channels``."""
    write_json(folder / "sensitivities.json", {"status": "ok", "channels": channels.tolist()})
    return {"sensitivities_file": folder / "sensitivities.json"}


def measured(made):
    return measure_sensitivities(load_full_precision(made.folder), made.tokens[:16]).channels


@pytest.mark.parametrize("error", [pytest.param("relative", marks=pytest.mark.slow), "trimmed", "fisher"])
def test_every_loss_falls_on_windows_that_were_not_trained_on(error, given, tmp_path):
    made = given(VARIED[1])
    options = {"trim_high": 0.01} if error == "trimmed" else {}
    context = sensitivities(tmp_path, measured(made)) if error == "fisher" else {}
    done = trained(made, "learned_rounding", context=context, error=error, steps=16, learning_rate=1 / 32, **options)
    assert all(end["end"] < end["start"] for end in done.ends.values())


def test_fisher_weights_count_in_the_stream_of_the_unmodified_model(given, tmp_path):
    """Equal weights are the squared error, with a rotated stream too; others change the errors."""
    made, steps = given(VARIED[1]), {"steps": 0}
    found = {
        name: trained(made, "learned_rounding", context=context, error=error, **steps).ends
        for name, error, context in (
            ("squared", "squared", {}),
            ("equal", "fisher", sensitivities(tmp_path, torch.full_like(measured(made), 3.0))),
        )
    }
    found["measured"] = trained(
        made, "learned_rounding", context=sensitivities(tmp_path, measured(made)), error="fisher", **steps
    ).ends
    for part, end in found["squared"].items():
        assert found["equal"][part]["start"] == pytest.approx(end["start"], rel=1e-4)
        assert found["measured"][part]["start"] != pytest.approx(end["start"], rel=1e-3)
    model = TransformedModel(recipe_of(made, CellSchemes(scheme("int4"))), made.context(), "range")
    inputs = model.embedded()
    plain = load_full_precision(made.folder).model
    with torch.no_grad():
        wanted = plain(made.tokens, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(model.advance(0, inputs) @ model.stream_back(), wanted, atol=0.02 * wanted.std())
    assert (
        TransformedModel(
            recipe_of(made, CellSchemes(scheme("int4")), transform="none"), made.context(), "range"
        ).stream_back()
        is None
    )


def test_fisher_weights_need_sensitivities(given, tmp_path):
    made = given(VARIED[1])
    with pytest.raises(ConfigError, match="error 'fisher' weights channels by the sensitivities"):
        trained(made, "learned_rounding", error="fisher", steps=0)
    write_json(tmp_path / "failed.json", {"status": "failed", "reason": "a gradient is NaN"})
    with pytest.raises(NumericalFailure, match="a gradient is NaN"):
        trained(
            made, "learned_rounding", error="fisher", steps=0, context={"sensitivities_file": tmp_path / "failed.json"}
        )
