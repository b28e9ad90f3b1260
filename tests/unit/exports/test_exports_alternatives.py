"""Recipes that refusals name: each exists and is accepted by the target that the refusal names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from grid_cases import SHAPE
from quantgrid.exports.features import Features
from quantgrid.exports.targets import TARGETS, judge
from quantgrid.models.shapes import ModelShape
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.schemes.presets import PRESETS

LIKE_A_PRESET = re.compile(r"\b(?:w\d+a\d+|nvfp|mxfp|mxint|nvint|fp|int|nf|kmeans)\d*\w*")
GRANULARITIES = ("channel", "group-64")


def verdict(target: str, entry: dict, granularity: str):
    schemes = CellSchemes.from_dict(cell_schemes(entry, granularity, "test", 64))
    return judge(target, Features(ModelShape(**SHAPE), schemes))


def refusals(target: str) -> Iterator[str]:
    """Every refusal of a target over presets, with and without rounded inputs."""
    for preset in PRESETS:
        for entry in ({"preset": preset}, {"preset": preset, "activation": None}):
            for granularity in GRANULARITIES:
                yield from verdict(target, entry, granularity).refusals


def accepts(target: str, entry: dict) -> bool:
    return any(not verdict(target, entry, granularity).refusals for granularity in GRANULARITIES)


@pytest.mark.parametrize("target", TARGETS)
def test_every_recipe_that_a_refusal_names_is_accepted(target):
    named = 0
    for nearest in {text.partition("; nearest: ")[2] for text in refusals(target)}:
        place = re.search("TO=([a-z-]+)", nearest)
        for preset in LIKE_A_PRESET.findall(re.sub("[{].*?[}]", "", nearest)):
            assert preset in PRESETS, nearest
            alone = "activation: null" in nearest and accepts(target, {"preset": preset, "activation": None})
            assert alone or accepts(place[1] if place else target, {"preset": preset}), nearest
            named += 1
        if place:
            assert place[1] in TARGETS
    assert named


def test_no_refusal_sends_global_scales_to_the_mitigation():
    phi = ModelShape(**{**SHAPE, "architecture": "Phi3ForCausalLM"})
    schemes = CellSchemes.from_dict(
        cell_schemes({"preset": "nvfp4", "activation": {"global_scale": "static"}}, "channel", "test", 64)
    )
    found = judge("compressed-tensors", Features(phi, schemes))
    assert "weight: {global_scale: site}" in found.text() and "mitigation" not in found.text()
    assert "mitigation" not in found.excluded["vLLM"]
    served = CellSchemes.from_dict(cell_schemes({"preset": "nvfp4_served"}, "channel", "test", 64))
    assert judge("compressed-tensors", Features(phi, served, shares_global_scale=True)).kind == "bound"
