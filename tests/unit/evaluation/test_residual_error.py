"""Residual error against forward hooks on both models, with the turn of a rotated stream from their
embeddings; its figure and its table."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.evaluation.residual_error import (
    INTERACTION,
    MEASURES,
    PARTS,
    SQUARES,
    error_growth,
    residual_basis,
    token_errors,
)
from quantgrid.ground.errors import NumericalFailure
from quantgrid.inference.transform import Transform, fit, folded_ends
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import END_ROLES, SITES
from quantgrid.models.skeletons import skeleton
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import (
    PackedCheckpoint,
    load_full_precision,
    load_quantized,
    save_quantized,
)
from quantgrid.quantization.sequential import RunningLayer, Sequential
from quantgrid.reporting.figures import residual_error
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.primitives.rotate import RotateResidual
from quantgrid.transforms.recipes import quarot, random_hadamard, scaling
from reference_decoder import site_inputs
from reference_statistics import write_statistics
from tiny_decoders import CASES, random_tokens, save

TRANSFORMS = {
    "none": [],
    "scaling": scaling.primitives(0.5, list(SITES)),
    "hadamard": random_hadamard.primitives(1),
    "quarot": quarot.primitives(2, "orthogonal"),
}
INT4 = CellSchemes(scheme("int4"), {site: [activation_scheme("int4")] for site in SITES})


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    case = replace(
        next(case for case in CASES if case.bias and case.tied), vocab=400
    )  # more tokens than channels: the embedding spans the stream
    config, state = case.build(torch.float32)
    folder, tokens = save(tmp_path_factory.mktemp("model"), config, state), random_tokens(config, 3, 24)
    return folder, tokens, write_statistics(folder / "statistics", site_inputs(state, config, tokens))


def model_of(given, transform, schemes, tmp_path):
    folder, _, statistics = given
    decoder = DecoderFolder(folder)
    fitted = fit(TRANSFORMS[transform], decoder, statistics)
    recipe = Recipe(fitted, schemes, rtn if schemes.weight else None, str(statistics))
    save_quantized(
        quantize_decoder(decoder, recipe).content,
        tmp_path / "model.safetensors",
        tmp_path / "quantgrid.json",
        {"axes": {}},
    )
    return (
        load_quantized(tmp_path, torch.float64),
        load_full_precision(folder, torch.float64),
        given[1],
        residual_basis(fitted, decoder.shape),
    )


def streams(model, tokens):
    """Output of every layer (layers, windows, tokens, d)."""
    found, handles = [], []
    for layer in model.model.layers:
        handles.append(
            layer.register_forward_hook(
                lambda _module, _inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_error_is_that_of_the_streams_of_two_whole_models(transform, given, tmp_path):
    model, reference, tokens, basis = model_of(given, transform, INT4, tmp_path)
    turn = torch.linalg.lstsq(reference.model.embed_tokens.weight, model.model.embed_tokens.weight).solution
    own, exact = streams(model, tokens), streams(reference, tokens) @ turn
    wanted = ((own - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(dim=(1, 2))
    found = error_growth(model, reference, tokens, basis)
    assert [list(layer) for layer in found] == [list(MEASURES)] * 2
    assert torch.allclose(torch.tensor([layer["error"] for layer in found], dtype=wanted.dtype), wanted, rtol=0.02)
    assert all(layer["error"] <= layer["added"] + layer["passed_on"] + 1e-9 for layer in found)
    # An embedding in bfloat16 comes first, whose rounding turns that of some activations; the first
    # layer's own share is larger, the second's not.
    assert found[0]["passed_on"] < found[0]["added"] < 2 and found[1]["passed_on"] > found[0]["passed_on"]


def test_squares_and_interaction_add_up_token_by_token():
    generator = torch.Generator().manual_seed(3)
    target, added, own = (torch.randn(2, 5, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    found = token_errors(own, added, target)
    whole, local, passed = (found[name] for name in SQUARES)
    assert found[INTERACTION].shape == (2, 5) and found[INTERACTION].abs().min() > 1e-3
    assert torch.allclose(whole, local + passed + found[INTERACTION], rtol=1e-12, atol=0)
    for part, square in zip(PARTS, SQUARES):
        assert torch.allclose(found[part].square(), found[square], rtol=1e-14, atol=0)


def test_parts_at_right_angles_have_no_interaction():
    target, local, passed = (
        torch.tensor(values, dtype=torch.float64) for values in ([1.0, 1.0], [3.0, 0.0], [0.0, 4.0])
    )
    found = token_errors(target + local + passed, target + local, target)
    wanted = {"error_squared": 12.5, "added_squared": 4.5, "passed_on_squared": 8.0, "interaction": 0.0}
    assert {name: found[name].item() for name in wanted} == pytest.approx(wanted)
    same = token_errors(target + 2 * local, target + local, target)
    assert same["interaction"].item() == pytest.approx(9.0) and same["error"].item() == pytest.approx(2 * same["added"])


def test_the_measured_squares_add_up(given, tmp_path):
    for layer in error_growth(*model_of(given, "hadamard", INT4, tmp_path)):
        parts = layer["added_squared"] + layer["passed_on_squared"] + layer["interaction"]
        assert layer["error_squared"] == pytest.approx(parts, rel=1e-9)


@pytest.mark.parametrize("transform", ["none", "hadamard", "quarot"])
def test_an_unrounded_model_has_an_error_of_bfloat16_in_whatever_basis(transform, given, tmp_path):
    found = error_growth(*model_of(given, transform, CellSchemes(), tmp_path))
    assert max(max(layer.values()) for layer in found) < 0.02


def test_what_is_passed_on_is_what_an_exact_layer_makes_of_an_error(given, tmp_path):
    """Of two layers only the first is rounded: the second adds nothing, and all its error is passed
    on."""
    model, reference, tokens, basis = model_of(given, "none", INT4, tmp_path)
    model.model.layers[1] = reference.model.layers[1]
    found = error_growth(model, reference, tokens, basis)
    assert found[1]["added"] < 1e-9 and found[1]["error"] == pytest.approx(found[1]["passed_on"])


def test_a_stream_that_is_not_finite_is_a_failure(given, tmp_path):
    model, reference, tokens, basis = model_of(given, "none", INT4, tmp_path)
    model.model.layers[1].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(NumericalFailure, match="after layer 1"):
        error_growth(model, reference, tokens, basis)


CENTERED = ("OPTForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM")  # families with LayerNorms
ROTATED = {"hadamard": [RotateResidual("hadamard", 1)], "orthogonal": [RotateResidual("orthogonal", 2)]}


def exact_model(decoder, transform, windows):
    """The transformed model in float64, with nothing rounded."""
    ends = folded_ends(transform, decoder, torch.float64)
    config = {**decoder.config, "tie_word_embeddings": "lm_head" not in ends}
    named = {END_ROLES[role]: tensor for role, tensor in ends.items()}
    model = skeleton(config, named, decoder.folder, torch.float64, "cpu")
    for index, module in enumerate(model.model.layers):
        layer = decoder.layer(index)
        transform.fold_layer(layer)
        RunningLayer(module, layer, {}, Sequential(windows, dtype=torch.float64))
    return model


@pytest.mark.parametrize("rotation", ROTATED)
@pytest.mark.parametrize("family", CENTERED)
def test_without_rounding_a_stream_that_lost_its_mean_has_no_error(family, rotation, family_model):
    """The rotation removes the mean of a stream before LayerNorms."""
    made = family_model(family)
    fitted = fit(ROTATED[rotation], made.decoder, None)
    model, reference = (
        exact_model(made.decoder, fitted, made.tokens),
        streamed(FullPrecision(made.folder, torch.float64)),
    )
    basis = residual_basis(fitted, made.decoder.shape)
    assert basis.sum(0).abs().max() < 1e-12  # a constant stream is mapped to zero
    found = error_growth(model, reference, made.tokens, basis)
    assert max(layer[part] for layer in found for part in PARTS) < 1e-6


@pytest.mark.parametrize("family", CENTERED)
def test_a_rotation_in_int8_has_about_the_error_of_no_transform(family, family_model, tmp_path):
    made, errors = family_model(family), {}
    for name, fitted in (("none", Transform()), ("rotated", fit(ROTATED["hadamard"], made.decoder, None))):
        recipe = Recipe(fitted, CellSchemes(scheme("int8")), rtn, str(made.statistics))
        (folder := tmp_path / name).mkdir()
        content = quantize_decoder(made.decoder, recipe).content
        save_quantized(content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
        model, reference = (
            streamed(PackedCheckpoint(folder, torch.float32, "cpu")),
            streamed(FullPrecision(made.folder)),
        )
        found = error_growth(model, reference, made.tokens, residual_basis(fitted, made.decoder.shape))
        errors[name] = torch.tensor([[layer[part] for part in PARTS] for layer in found])
    ratio = errors["rotated"] / errors["none"]
    assert ratio.min() > 0.5 and ratio.max() < 1.5, ratio


def test_figure_and_table(tmp_path):
    paths = []
    for number, format in enumerate(("int4", "mxfp4")):
        layers = [{"error": 0.1 * layer, "added": 0.05, "passed_on": 0.08 * layer} for layer in range(1, 5)]
        axes = {
            "model": "m",
            "transform": "none",
            "mitigation": "rtn",
            "granularity": "-",
            "format": format,
            "corpus": "docs",
            "key": "k",
        }
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({"axes": axes, "status": "ok", "layers": layers}))
    paths.append(tmp_path / "failed.json")
    paths[-1].write_text(json.dumps({"axes": axes, "status": "failed", "reason": "NaN"}))
    table = residual_error.read(paths)
    assert list(table.layer) == [1, 2, 3, 4] * 2 and list(table.format.unique()) == ["int4", "mxfp4"]
    figure = residual_error.plot(table)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "no transform + RTN\nW4A4 INT4",
        "no transform + RTN\nW4A4 MXFP4",
    ]
    assert figure.axes[0].get_yscale() == "log"
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert residual_error.plot(table[:0]).axes
    both = residual_error.plot(pd.concat([table, table.assign(model="n")]))
    titles = [ax.get_title(loc="left") for ax in both.axes]
    # a row for each recipe
    assert titles == ["no transform + RTN, W4A4 INT4", "", "no transform + RTN, W4A4 MXFP4", ""]
    # and a column for each model
    assert [text.get_text() for ax in both.axes for text in ax.texts] == ["m", "n"]
