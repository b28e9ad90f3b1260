"""Folded norms, shifts and searched scales, apart from function preservation (test_transforms.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantgrid.calibration.layers import DecoderLayer
from quantgrid.config.registry import TRANSFORMS, load
from quantgrid.inference.transform import Transform, layer_state
from quantgrid.models.plans import SITES
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform
from quantgrid.transforms.primitives.scale import Scale, widened
from quantgrid.transforms.primitives.search_objective import OutputError
from quantgrid.transforms.primitives.searched_clip import SearchedClip, clipped
from quantgrid.transforms.primitives.searched_scale import SearchedPower, SearchedSmoothing, SearchedThreshold
from quantgrid.transforms.primitives.shift import Shift
from quantgrid.transforms.recipes import (
    fold_norms,
    random_hadamard,
    shifting,
)
from reference_statistics import close, run, statistics_of
from tiny_decoders import NORM_OF, VARIED
from transform_cases import ALL, GROUPS, INT4, LLAMA, Folded, changed, folded, heavy

NOTHING = CellSchemes()


@pytest.fixture
def layer(given) -> DecoderLayer:
    """A layer with the statistics of the calibration file."""
    made = given(LLAMA)
    return layer_state(made.decoder, 1, made.statistics)


# -- folded norms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_folded_gains_are_ones_and_stand_in_the_columns_of_the_linears(case, given):
    made = given(case)
    result = folded(made, made.fitted(fold_norms.primitives()))
    for layer in result.layers:
        before = made.decoder.layer(layer.index).weights
        for site, norm in NORM_OF.items():
            assert not layer.online[site] and (layer.weights[norm] == 1).all() and (before[norm] != 1).any()
            assert all(torch.equal(layer.weights[linear], before[linear] * before[norm]) for linear in SITES[site])
        assert all(
            torch.equal(layer.weights[role], weight)
            for role, weight in before.items()
            if role not in (*NORM_OF.values(), *(linear for site in NORM_OF for linear in SITES[site]))
        )


# -- shifting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_a_shift_of_zero_is_the_identity(case, given):
    made = given(case)
    transform = made.fitted(shifting.primitives("midrange", ALL))
    transform.parameters = {name: torch.zeros_like(tensor) for name, tensor in transform.parameters.items()}
    result = folded(made, transform)
    assert torch.equal(run(result.state, made.config, made.tokens[:2], result.online)[0], made.logits)
    assert all(torch.equal(result.state[name], tensor) for name, tensor in made.state.items())


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_the_midrange_halves_the_range_and_the_mean_centres(case, given):
    made = given(case)
    before = folded(made, Transform(), "exact").layers
    for center in ("midrange", "mean"):
        for layer, old in zip(folded(made, made.fitted(shifting.primitives(center, ALL)), "exact").layers, before):
            for site in ALL:
                found, was, shape = layer.statistics[site], old.statistics[site], layer.shape
                half, mean = (was.maximum - was.minimum) / 2, found.mean
                if site == "output_input":
                    low, high = (
                        extreme.view(shape.kv_heads, -1, shape.head_dim) for extreme in (was.minimum, was.maximum)
                    )
                    half = widened((high.amax(1) - low.amin(1)).flatten() / 2, site, shape)
                    mean = mean.view(shape.kv_heads, -1, shape.head_dim).mean(1)
                if center == "mean":
                    assert mean.abs().max() < 1e-6 * was.maximum_absolute.max()
                elif site != "output_input":
                    assert close(found.maximum_absolute, half, 1e-6)
                else:
                    assert bool((found.maximum_absolute <= half * (1 + 1e-6)).all())


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_the_median_centres_the_tokens_of_a_kv_channel(case, given):
    made = given(case)
    before = folded(made, Transform(), "exact").layers
    for layer, old in zip(folded(made, made.fitted(shifting.primitives("median", ALL)), "exact").layers, before):
        for site in ALL:
            z, samples = (
                old.statistics[site].samples.double() - layer.statistics[site].samples.double(),
                old.statistics[site].samples,
            )
            if site == "output_input":
                shape = layer.shape
                samples = torch.cat(samples.view(len(samples), shape.kv_heads, -1, shape.head_dim).unbind(2)).flatten(1)
            wanted = widened(samples.double().quantile(0.5, dim=0), site, layer.shape)
            assert torch.allclose(z, wanted.expand_as(z), atol=1e-5 * samples.abs().max())


@pytest.mark.parametrize("center, held", [("median", True), ("mean", False), ("midrange", False)])
def test_a_few_massive_tokens_do_not_move_the_median(center, held, layer):
    """First tokens whose activation exceeds all others ten thousandfold, in the share that a token
    sample holds them."""
    shape, generator = layer.shape, torch.Generator().manual_seed(0)
    x = torch.randn(272, shape.hidden_size, generator=generator, dtype=torch.float64) * 0.2
    x[:48, 3] = 2850.0
    layer.statistics["mlp_input"] = statistics_of(x)
    assert (Shift(center, ["mlp_input"]).fit_layer(layer)["mlp_input"].abs().max() < 0.1) == held


@pytest.mark.parametrize("method, option", [("shifting", "sites"), ("outlier_suppression_plus", "shifted_sites")])
def test_by_default_the_median_is_subtracted_everywhere_but_at_down_input(method, option):
    options = TRANSFORMS[method].resolve({"method": method}, method)["options"]
    assert options["center"] == "median" and options[option] == ["attention_input", "output_input", "mlp_input"]
    made = load("transforms", method).primitives(**options)
    assert (made[0].center, made[0].sites) == ("median", options[option]) and made[-1].sites == options["sites"]


def test_a_shift_at_output_input_costs_nothing_online(given):
    made = given(LLAMA)
    result = folded(made, made.fitted(shifting.primitives("midrange", ALL)))
    assert {site: [operation["operation"] for operation in result.online[0, site]] for site in ALL} == {
        site: [] if site == "output_input" else ["subtract"] for site in ALL
    }
    biases = {name.split(".")[-2] for name in result.state if name.endswith(".bias")}
    assert biases == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "forgotten", ["q_proj.bias", "o_proj.bias", "v_proj.bias", "down_proj.bias", "up_proj.bias", "online"]
)
def test_a_forgotten_part_of_a_shift_shows(forgotten, given):
    made = given(LLAMA)
    result = folded(made, made.fitted(shifting.primitives("midrange", ALL)))
    assert changed(made, result) < 1e-9
    state = {name: tensor for name, tensor in result.state.items() if not name.endswith(forgotten)}
    assert changed(made, Folded(state, {} if forgotten == "online" else result.online)) > 1e-6


def test_the_shift_comes_before_r4(given):
    made = given(LLAMA)
    result = folded(made, made.fitted([*shifting.primitives("midrange", ALL), *random_hadamard.primitives(0)]))
    assert [operation["operation"] for operation in result.online[1, "down_input"]] == ["subtract", "hadamard"]
    assert [operation["operation"] for operation in result.online[1, "mlp_input"]] == [
        "subtract"
    ]  # R1 turned the shift itself


# -- searches --------------------------------------------------------------------------------------


def defined_error(
    weights: list[Tensor], x: Tensor, s: Tensor, schemes: CellSchemes, site: str, activations: bool
) -> float:
    """The objective from its definition, on the tokens themselves: |x Eᵀ|² / |x Wᵀ|² + |(Q(x/s) -
    x/s) Ŵᵀ|² / |x Wᵀ|²."""
    energy = weight_part = activation_part = 0.0
    prepared = (x / s).float()
    rounded = fake_quantize(prepared, schemes.activation[site][0]) if activations else prepared
    for weight in weights:
        used = fake_quantize((weight * s).float(), schemes.weight).double()
        energy += (x @ weight.T).square().sum()
        weight_part += (x @ (used / s - weight).T).square().sum()
        activation_part += ((rounded - prepared).double() @ used.T).square().sum()
    return ((weight_part + activation_part) / energy).item()


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("schemes", [INT4, GROUPS], ids=["channel", "group"])
def test_the_objective_is_the_output_error_of_the_tokens(schemes, activations):
    x = heavy(200, 32)
    weights = [heavy(24, 32, 1).float().double(), heavy(16, 32, 2).float().double()]
    s = torch.rand(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    named = dict(zip(("gate", "up"), weights))
    error = OutputError(named, [*named], statistics_of(x), schemes, "mlp_input", activations)
    assert math.isclose(error(s), defined_error(weights, x, s, schemes, "mlp_input", activations), rel_tol=1e-3)
    assert OutputError(named, [*named], statistics_of(x), NOTHING, "mlp_input", activations)(s) == 0.0


SEARCHES = {
    "smoothing": lambda schemes, sites: SearchedSmoothing(sites, 5, True, schemes, alpha=0.35),
    "power": lambda schemes, sites: SearchedPower(sites, 6, False, schemes),
    "power with activations": lambda schemes, sites: SearchedPower(sites, 6, True, schemes),
    "threshold": lambda schemes, sites: SearchedThreshold(sites, 6, True, schemes, lowest=0.2),
}


@pytest.mark.parametrize("schemes", [INT4, GROUPS], ids=["channel", "group"])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_takes_the_best_candidate_and_never_less_than_its_start(search, schemes, layer):
    primitive = SEARCHES[search](schemes, ALL)
    found = primitive.fit_layer(layer)
    for site in ALL:
        error = OutputError(
            layer.weights,
            SITES[site],
            layer.statistics[site],
            schemes,
            site,
            primitive.round_activations,
        )
        tried = [(error(widened(s, site, layer.shape)), value, s) for value, s in primitive.candidates(layer, site)]
        start, least = found[f"{site}.errors"].tolist()
        assert start == tried[0][0] and least == min(tried, key=lambda one: one[0])[0] <= start
        chosen = next(s for value, _, s in tried if value == least)
        assert torch.equal(found[site], chosen) and found[f"{site}.chosen"].item() in [value for _, value, _ in tried]
        assert bool((found[site] > 0).all())


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_helps_where_a_channel_is_an_outlier(search, layer):
    factor = torch.ones(layer.shape.hidden_size, dtype=torch.float64).index_fill(0, torch.tensor([5]), 200.0)
    layer.statistics["mlp_input"] = layer.statistics["mlp_input"].transformed(factor)
    for linear in ("gate", "up"):
        layer.weights[linear] = layer.weights[linear] / factor
    start, least = SEARCHES[search](INT4, ["mlp_input"]).fit_layer(layer)["mlp_input.errors"].tolist()
    assert least < 0.8 * start or (search == "smoothing" and least < start)


@pytest.mark.parametrize("search", SEARCHES)
def test_where_nothing_is_rounded_the_start_is_kept(search, layer):
    found = SEARCHES[search](NOTHING, ALL).fit_layer(layer)
    for site in ALL:
        start = next(SEARCHES[search](NOTHING, ALL).candidates(layer, site))[1]
        assert torch.equal(found[site], start) and found[f"{site}.errors"].tolist() == [0.0, 0.0]
        assert search == "smoothing" or torch.equal(start, torch.ones_like(start))


def test_smoothing_searches_smoothquants_factors(layer):
    primitive = SearchedSmoothing(ALL, 3, True, INT4, alpha=0.35)
    for site in ALL:
        tried = list(primitive.candidates(layer, site))
        assert [alpha for alpha, _ in tried] == [0.35, 0.0, 0.5, 1.0]
        assert all(torch.equal(s, Scale(alpha, [site]).fit_layer(layer)[site]) for alpha, s in tried)


def test_powers_are_balanced_and_spare_dead_channels(layer):
    layer.statistics["mlp_input"] = layer.statistics["mlp_input"].transformed(
        torch.ones(64, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0)
    )
    for power, s in SearchedPower(["mlp_input"], 4, False, INT4).candidates(layer, "mlp_input"):
        live = s[torch.arange(64) != 3]
        mean = layer.statistics["mlp_input"].mean_absolute[torch.arange(64) != 3]
        assert s[3] == 1 and math.isclose((live.amax() * live.amin()).item(), 1, rel_tol=1e-9)
        assert close(live / live[0], (mean / mean[0]) ** power, 1e-9)


def test_thresholds_cut_the_extremes(layer):
    for site in ALL:
        extremes, last = layer.statistics[site], math.inf
        for t, s in SearchedThreshold([site], 5, True, INT4, lowest=0.1).candidates(layer, site):
            wide = widened(s, site, layer.shape)
            reached = extremes.maximum_absolute / wide
            assert bool((reached <= t * (1 + 1e-12)).all()) and bool((s >= 1).all()) and t < last
            if site != "output_input":
                assert torch.equal(
                    wide,
                    torch.maximum(torch.ones_like(wide), torch.maximum(extremes.maximum / t, -extremes.minimum / t)),
                )
            last = t
        assert math.isclose(last, 0.1, rel_tol=1e-9)


def test_the_schemes_of_the_cell_are_not_kept(given, tmp_path):
    made = given(LLAMA)
    transform = made.fitted([SearchedPower(ALL, 2, False, INT4), SearchedClip(["o"], 2, INT4)])
    transform.save(tmp_path / "transform.safetensors")
    loaded = load_transform(tmp_path / "transform.safetensors")
    assert (
        loaded.primitives == transform.primitives
        and loaded.primitives[0].cell is None
        and transform.primitives[0].cell is INT4
    )
    one, other = folded(made, transform), folded(made, loaded)
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())


def group_errors(used: Tensor, weight: Tensor, moment: Tensor, size: int, schemes: CellSchemes) -> Tensor:
    """(m, groups): e C eᵀ of every row and group of ``used`` once it is rounded, against
    ``weight``."""
    change = (fake_quantize(used, schemes.weight) - weight).double()
    starts = range(0, len(moment), size)
    return torch.stack(
        [
            (change[:, i : i + size] @ moment[i : i + size, i : i + size] * change[:, i : i + size]).sum(-1)
            for i in starts
        ],
        -1,
    )


@pytest.mark.parametrize(
    "schemes", [INT4, GROUPS, CellSchemes(scheme("int4", granularity="tensor"))], ids=["channel", "group", "tensor"]
)
def test_clipped_weights_lose_less_of_the_output(schemes, layer):
    # an outlier weight whose row rounds to nothing unless it is clipped
    layer.weights["down"][3, 4] = 40.0
    primitive = SearchedClip(["down", "o"], 10, schemes)
    bounds = primitive.fit_layer(layer)
    for linear, site in (("down", "down_input"), ("o", "output_input")):
        weight, moment = layer.weights[linear].float(), layer.statistics[site].second_moment
        rows, groups = bounds[linear].shape
        size, largest = weight.shape[1] // groups, weight.abs().unflatten(-1, (groups, -1)).amax(-1)
        assert (rows, groups) == schemes.weight.scale_shape(weight.shape)[-2:]
        largest = largest.amax(0, keepdim=True) if rows == 1 else largest
        assert bool((bounds[linear] <= largest).all()) and bool((bounds[linear] >= 0.5 * largest).all())
        before, after = (
            group_errors(used, weight, moment.double(), size, schemes)
            for used in (weight, clipped(weight, bounds[linear]))
        )
        if rows == 1:
            before, after = before.sum(0), after.sum(0)
        assert bool((after <= before * (1 + 1e-3) + 1e-9).all()) and (rows == 1 or after.sum() < before.sum())
    assert SearchedClip(["down"], 10, NOTHING).fit_layer(layer) == {}


def test_clipping_limits_what_is_rounded_and_nothing_else(given):
    made = given(LLAMA)
    done = folded(made, made.fitted([SearchedClip(["up", "down"], 4, INT4)]))
    assert changed(made, done) == 0
    layer = done.layers[0]
    assert set(layer.clips) == {"up", "down"} and not torch.equal(
        layer.clips["up"](layer.weights["up"]), layer.weights["up"]
    )
    assert not folded(made, made.fitted([SearchedClip(["up", "down"], 4, NOTHING)])).layers[0].clips
