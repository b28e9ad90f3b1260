"""Rotations chosen by the error of rounded outputs: chosen where it falls, and one of both otherwise."""

from __future__ import annotations

import pytest
import torch

from quantgrid.config import registry
from quantgrid.ground.errors import ConfigError
from quantgrid.inference.activations import choose
from quantgrid.inference.transform import fit, layer_state
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform
from quantgrid.transforms.primitives.chosen_rotate import ChosenDown, ChosenHeads, rounded_error
from quantgrid.transforms.primitives.rotate import RotateDown, RotateHeads
from quantgrid.transforms.recipes import random_hadamard
from transform_cases import GROUPS, HARDEST, INT4, changed, folded

SCHEMES = {
    "per channel": INT4,
    "in groups": GROUPS,
    "weights alone": CellSchemes(scheme("int4")),
    "activations alone": CellSchemes(None, {"down_input": [activation_scheme("int4")]}),
    "nothing": CellSchemes(),
}


@pytest.fixture(scope="module")
def made(given):
    return given(HARDEST)


SITES = {"R2": ("v", "o"), "R4": ("down",)}


def of(rotation: str, schemes: CellSchemes | None = None):
    if schemes is None:
        return RotateHeads(5) if rotation == "R2" else RotateDown()
    return ChosenHeads(5, schemes=schemes) if rotation == "R2" else ChosenDown(schemes=schemes)


def error_by_hand(layer, linears, schemes):
    total = 0.0
    for linear in linears:
        site = layer.plan.site_of[linear]
        x, weight = layer.statistics[site].samples.float(), layer.weights[linear].float()
        candidates = schemes.activation.get(site)
        rounded = choose(candidates, layer.statistics[site])[0](x) if candidates else x
        used = fake_quantize(weight, schemes.weight) if schemes.weight else weight
        total += ((rounded @ used.mT - x @ weight.mT).double().norm() / (x @ weight.mT).double().norm()).item() ** 2
    return total


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rotation", SITES)
def test_the_chosen_error_is_the_smaller_of_both(rotation, name, made):
    schemes, decoder = SCHEMES[name], made.decoder
    chosen, plain = made.fitted([of(rotation, schemes)]), made.fitted([of(rotation)])
    for index in range(decoder.shape.layers):
        bare, with_it, found = (layer_state(decoder, index, made.statistics) for _ in range(3))
        plain.fold_layer(with_it)
        chosen.fold_layer(found)
        errors = [error_by_hand(layer, SITES[rotation], schemes) for layer in (bare, with_it, found)]
        assert errors[2] == pytest.approx(min(errors[:2]), rel=1e-5)
        assert rounded_error(bare, SITES[rotation], schemes) == pytest.approx(errors[0], rel=1e-4, abs=1e-12)
        part = chosen.part(f"0.{index}.")
        prefix = "" if rotation == "R2" else "down_input."
        assert part[f"{prefix}errors"].tolist() == pytest.approx(errors[:2], rel=1e-4, abs=1e-12)
        assert bool(part[f"{prefix}chosen"].item()) == (part[f"{prefix}errors"][1] < part[f"{prefix}errors"][0])
        wanted = with_it if part[f"{prefix}chosen"].item() else bare
        assert all(torch.equal(found.weights[role], wanted.weights[role]) for role in wanted.weights)
        assert found.online == wanted.online


def test_nothing_to_round_leaves_everything(made):
    transform = made.fitted([of("R2", CellSchemes()), of("R4", CellSchemes())])
    result = folded(made, transform)
    assert not any(result.online.values())
    assert all(not tensor.any() for name, tensor in transform.parameters.items() if name.endswith("chosen"))


def test_the_function_is_kept_and_what_is_saved_is_what_was_fitted(made, tmp_path):
    transform = made.fitted(random_hadamard.primitives(6, choose=["R2", "R4"], schemes=INT4))
    assert changed(made, folded(made, transform)) < 1e-9
    transform.save(tmp_path / "transform")
    loaded = load_transform(tmp_path / "transform")
    assert changed(made, folded(made, loaded)) < 1e-9
    one, other = (folded(made, found).state for found in (transform, loaded))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_without_a_choice_it_is_the_random_hadamard_rotation(made):
    one, other = (
        fit(random_hadamard.primitives(7, **more), made.decoder, made.statistics) for more in ({}, {"choose": []})
    )
    assert one.parameters.keys() == other.parameters.keys()


def test_a_choice_needs_its_rotation():
    method = registry.method("transforms", "random_hadamard")
    entry = {"method": "random_hadamard", "choose": ["R2", "R4"]}
    options = method.resolve(entry, "mine")["options"]
    assert method.is_calibrated(options) and method.is_fitted_to_scheme(options)
    assert not method.is_fitted_to_scheme(method.resolve({"method": "random_hadamard"}, "mine")["options"])
    with pytest.raises(ConfigError, match=r"mine\.choose: .* set rotations to 'R4'"):
        method.resolve({**entry, "rotations": ["R1", "R2"]}, "mine")
