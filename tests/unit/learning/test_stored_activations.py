"""Kurtosis and whip of stored activations: exact values, invariances, and what learning does to them."""

from __future__ import annotations

import pytest
import torch

from learned_cases import learned, learned_values, start
from quantgrid.calibration.statistics import LARGEST
from quantgrid.config import check
from quantgrid.ground.errors import ConfigError
from quantgrid.inference.transform import layer_state
from quantgrid.learning import stored_activations
from quantgrid.learning.stored_activations import StoredActivations, flatness
from quantgrid.learning.training import evaluate
from quantgrid.linalg.hadamard import random_orthogonal
from tiny_decoders import VARIED

OBJECTIVES = ("kurtosis", "whip")


@pytest.fixture
def few_tokens(monkeypatch):
    """Calibrations of tests store fewer tokens than an objective asks for."""
    monkeypatch.setattr(stored_activations, "LEAST", 32)


def tokens(count=200, n=64):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, n, generator=generator, dtype=torch.float64)
    return drawn * (1 + 20 * (torch.arange(n) % 13 == 4))


def test_an_even_spread_has_no_loss_and_one_outlier_the_largest():
    even = torch.linspace(-1, 1, 20001, dtype=torch.float64)[None]
    assert flatness(even, "kurtosis") < 1e-3
    alone = torch.zeros(3, 100, dtype=torch.float64)
    alone[:, 7] = 5.0
    assert flatness(alone, "kurtosis").item() == pytest.approx(100 - 1.8)
    assert flatness(alone, "whip").item() == pytest.approx((99 + torch.exp(torch.tensor(-10.0)).item()) / 100)
    signs = torch.ones(3, 100, dtype=torch.float64) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)
    assert flatness(signs, "kurtosis").item() == pytest.approx(0.8)  # two values are flatter than uniform
    assert flatness(signs, "whip").item() == pytest.approx(torch.exp(torch.tensor(-1.0)).item())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_signs_order_and_units_do_not_matter_but_rotations_do(objective):
    x = tokens()
    n = x.shape[1]
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    value = flatness(x, objective)
    for same in (x * signs, x[:, order], 7 * x, x * torch.linspace(1, 9, len(x), dtype=x.dtype)[:, None]):
        assert flatness(same, objective).item() == pytest.approx(value.item())
    with_silence = torch.cat([x, torch.zeros(5, n, dtype=x.dtype)])
    assert flatness(with_silence, objective).item() == pytest.approx(value.item())
    assert flatness(x @ random_orthogonal(n, 3), objective) < value - 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_start_is_that_of_the_folded_statistics_and_training_lowers_it(objective, given, few_tokens):
    made = given(VARIED[1])
    options = {"objective": objective, "steps": 30, "batch_size": 2, "learning_rate": 0.05}
    begun = start(made, "optimized_rotation", **options)
    context = made.context(statistics_file=made.folder / "statistics")
    stored = StoredActivations(begun, context, objective, "cpu")
    by_hand = []
    for index in range(made.decoder.shape.layers):
        layer = layer_state(made.decoder, index, made.folder / "statistics")
        begun.fold_layer(layer)
        sites = ("attention_input", "output_input", "mlp_input")
        samples = [layer.statistics[site].samples[:-LARGEST].float() for site in sites]  # all that are drawn
        assert min(map(len, samples)) > 32
        by_hand += [flatness(tokens, objective).item() for tokens in samples]
    assert evaluate(stored, learned_values(begun)) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    _, done = learned(made, "optimized_rotation", context={"statistics_file": made.folder / "statistics"}, **options)
    end = done.ends["all"]
    assert end["start"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert end["kept"] == "learned" and end["end"] < end["start"]
    assert evaluate(stored, learned_values(done.transform)) == pytest.approx(end["end"], rel=1e-4)


def test_too_few_stored_tokens_are_refused(given):
    made = given(VARIED[1])
    begun = start(made, "optimized_rotation", objective="whip")
    with pytest.raises(ConfigError, match="need 4096 tokens of a site"):
        StoredActivations(begun, made.context(statistics_file=made.folder / "statistics"), "whip", "cpu")


def config(samples, windows=40, **entry):
    return {
        "models": {"m": {"source": "builtin", "name": "reference-1m"}},
        "corpora": {
            "text": {"source": "builtin", "part": "calibration", "window": 128, "windows": windows},
            "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 4},
        },
        "calibrations": {"default": {"corpus": "text", "samples": samples}},
        "transforms": {"mine": {"method": "optimized_rotation", **entry}},
        "evaluate": {"perplexity": ["docs"]},
        "studies": {
            "one": {
                "models": ["m"],
                "transforms": ["mine"],
                "mitigations": ["rtn"],
                "granularities": ["channel"],
                "formats": ["int4"],
            }
        },
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_calibration_that_stores_too_few_tokens_is_refused_at_planning(objective):
    assert check(config(4096, objective=objective)) and check(config(256, objective="layer_wise"))
    for samples, windows in ((4095, 40), (8192, 31)):
        with pytest.raises(ConfigError, match=r"transforms\.mine: .* 4096 stored tokens .* calibration 'default'"):
            check(config(samples, windows, objective=objective))


@pytest.mark.parametrize(
    "option", [{"loss": "kl_top"}, {"round_weights": True}, {"gradient": "identity"}, {"held_out": 20}]
)
def test_options_of_the_network_have_no_meaning_without_it(option):
    with pytest.raises(ConfigError, match=rf"transforms\.mine\.{next(iter(option))}: .* set objective to"):
        check(config(4096, objective="whip", **option))
