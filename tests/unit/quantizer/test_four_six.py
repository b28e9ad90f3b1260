"""Tests of ``range: four_six``: the choice per block against both scales tried apart."""

from __future__ import annotations

import pytest
import torch

from quantgrid.ground.errors import ConfigError
from quantgrid.quantizer import fake_quantize, find_parameters
from quantgrid.quantizer.scales import QuantizationParameters
from quantgrid.schemes import scheme

FOUR_SIX = scheme("nvfp4", range="four_six")
PLAIN = scheme("nvfp4")
BEST = scheme("nvfp4", range="exhaustive", mse_norm=2.0)


def errors(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Squared errors by block of 16."""
    return (x - rounded).unflatten(-1, (-1, 16)).square().sum(-1)


def samples(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator)
    return x if kind == "normal" else x / torch.rand(64, 256, generator=generator).clamp(min=0.05)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_every_block_takes_the_better_of_both_scales_tried_apart(kind):
    x = samples(kind)
    top = x.abs().amax() / (6 * 256)
    by_hand = []
    for largest in (6, 4):
        scale = (x.unflatten(-1, (-1, 16)).abs().amax(-1) / largest / top).to(torch.float8_e4m3fn)
        by_hand.append(fake_quantize(x, PLAIN, QuantizationParameters(scale, None, top.view(1, 1))))
    six, four = (errors(x, rounded) for rounded in by_hand)
    rounded = fake_quantize(x, FOUR_SIX)
    expected = torch.where((four < six).repeat_interleave(16, -1), by_hand[1], by_hand[0])
    assert torch.equal(rounded, expected)
    assert 0.1 < (four < six).float().mean() < 0.6


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_the_error_lies_between_the_exhaustive_search_and_the_plain_scale(kind):
    x = samples(kind)
    level = find_parameters(x, FOUR_SIX).global_scale
    found = {
        name: errors(x, fake_quantize(x, given, find_parameters(x, given, level)))
        for name, given in (("plain", PLAIN), ("four_six", FOUR_SIX), ("best", BEST))
    }
    assert (found["four_six"] <= found["plain"]).all()
    assert (found["best"] <= found["four_six"] * (1 + 1e-5)).all()
    assert found["four_six"].sum() < 0.95 * found["plain"].sum()


def test_six_and_five_are_held_better_with_four_at_the_top():
    """Scale 1.5 gives 6 and 4.5, scale 1 gives 6 and 4 (5 is a tie that goes to the even code)."""
    x = torch.zeros(1, 16)
    x[0, :2] = torch.tensor([6.0, 5.0])
    parameters = find_parameters(x, FOUR_SIX, 1.0)
    assert parameters.scale.float().item() == 1.5
    assert fake_quantize(x, FOUR_SIX, parameters)[0, :3].tolist() == [6.0, 4.5, 0.0]
    assert fake_quantize(x, PLAIN, find_parameters(x, PLAIN, 1.0))[0, :2].tolist() == [6.0, 4.0]


def test_zeros_stay_zero_and_the_largest_scale_fits():
    x = torch.zeros(2, 32)
    x[0, 0] = 3e4
    parameters = find_parameters(x, FOUR_SIX)
    assert parameters.scale.float().amax() <= 384
    assert torch.equal(fake_quantize(x, FOUR_SIX, parameters) == 0, x == 0)


def test_the_preset_searches_weights_and_takes_four_or_six_for_activations():
    from quantgrid.schemes import activation_scheme

    assert scheme("nvfp4_46").range == "exhaustive"
    activation = activation_scheme("nvfp4_46")
    assert (activation.range, activation.global_scale) == ("four_six", "token")


@pytest.mark.parametrize(
    "name, given",
    [
        ("mxfp4", {}),
        ("int4", {}),
        ("nvint4", {}),
        ("nvfp4", {"clip_ratio": 0.9}),
        ("nvfp4", {"global_scale": "none"}),
    ],
)
def test_other_formats_are_refused(name, given):
    with pytest.raises(ConfigError, match="four_six"):
        scheme(name, range="four_six", **given)
