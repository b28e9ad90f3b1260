"""What each fixed, calibrated and searched transform promises beyond leaving the function as it is (that: test_transforms.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantgrid.architecture import NORM_OF, SITES
from quantgrid.cell_schemes import CellSchemes
from quantgrid.decoders import DecoderLayer
from quantgrid.errors import ConfigError
from quantgrid.hadamard import hadamard_matrix
from quantgrid.mitigations.rtn import rtn
from quantgrid.online import ONLINE, apply, arithmetic, as_rows
from quantgrid.quantizer import activation_scheme, fake_quantize, scheme
from quantgrid.registry import TRANSFORMS, load
from quantgrid.transforms import block_hadamard, fold_norms, quarot, random_hadamard, random_orthogonal, reordering, shifting
from quantgrid.transforms.block_rotate import BlockHadamard, GreedyBlocks, greedy_rotation, spreading_matrix
from quantgrid.transforms.composition import Transform, fit, layer_state
from quantgrid.transforms.reorder import Reorder, zigzag
from quantgrid.transforms.rotate import MixHeads, RotateDown, RotateHeads, RotateResidual
from quantgrid.transforms.rotate_principal import RotatePrincipal
from quantgrid.transforms.scale import Scale, smoothing_factors, widened
from quantgrid.transforms.search_objective import OutputError
from quantgrid.transforms.searched_clip import SearchedClip, clipped
from quantgrid.transforms.searched_scale import SearchedPower, SearchedSmoothing, SearchedThreshold
from quantgrid.transforms.shift import Shift
from reference_statistics import apply_online, close, run, statistics_of
from test_transforms import ALL, INT4, LLAMA, NORMS, VARIED, Folded, changed, folded, given  # noqa: F401 (a fixture)
from tiny_decoders import CASES

GROUPS = CellSchemes(scheme("int4", group_size=16), {site: [activation_scheme("int4", group_size=16)] for site in SITES})
NOTHING = CellSchemes()


@pytest.fixture
def layer(given) -> DecoderLayer:  # noqa: F811
    """A layer with the statistics of the calibration file."""
    made = given(LLAMA)
    return layer_state(made.decoder, 1, made.statistics)


def heavy(tokens: int, n: int, seed: int = 0) -> Tensor:
    """(tokens, n) float64 with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    return x * torch.where(torch.rand(n, generator=generator) < 0.1, 30.0, 1.0)


# -- folded norms ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_folded_gains_are_ones_and_stand_in_the_columns_of_the_linears(case, given):  # noqa: F811
    made = given(case)
    result = folded(made, made.fitted(fold_norms.primitives()))
    for layer in result.layers:
        before = made.decoder.layer(layer.index).weights
        for site, norm in NORM_OF.items():
            assert not layer.online[site] and (layer.weights[norm] == 1).all() and (before[norm] != 1).any()
            assert all(torch.equal(layer.weights[linear], before[linear] * before[norm]) for linear in SITES[site])
        assert all(torch.equal(layer.weights[role], weight) for role, weight in before.items()
                   if role not in (*NORM_OF.values(), *(linear for site in NORM_OF for linear in SITES[site])))


# -- shifting ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_a_shift_of_zero_is_the_identity(case, given):  # noqa: F811
    made = given(case)
    transform = made.fitted(shifting.primitives("midrange", ALL))
    transform.parameters = {name: torch.zeros_like(tensor) for name, tensor in transform.parameters.items()}
    result = folded(made, transform)
    assert torch.equal(run(result.state, made.config, made.tokens[:2], result.online)[0], made.logits)
    assert all(torch.equal(result.state[name], tensor) for name, tensor in made.state.items())


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_the_midrange_halves_the_range_and_the_mean_centres(case, given):  # noqa: F811
    made = given(case)
    before = folded(made, Transform(), "exact").layers
    for center in ("midrange", "mean"):
        for layer, old in zip(folded(made, made.fitted(shifting.primitives(center, ALL)), "exact").layers, before):
            for site in ALL:
                found, was, shape = layer.statistics[site], old.statistics[site], layer.shape
                half, mean = (was.maximum - was.minimum) / 2, found.mean
                if site == "output_input":
                    low, high = (extreme.view(shape.kv_heads, -1, shape.head_dim) for extreme in (was.minimum, was.maximum))
                    half = widened((high.amax(1) - low.amin(1)).flatten() / 2, site, shape)
                    mean = mean.view(shape.kv_heads, -1, shape.head_dim).mean(1)
                if center == "mean":
                    assert mean.abs().max() < 1e-6 * was.maximum_absolute.max()
                elif site != "output_input":
                    assert close(found.maximum_absolute, half, 1e-6)
                else:
                    assert bool((found.maximum_absolute <= half * (1 + 1e-6)).all())


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_the_median_centres_the_tokens_of_a_kv_channel(case, given):  # noqa: F811
    made = given(case)
    before = folded(made, Transform(), "exact").layers
    for layer, old in zip(folded(made, made.fitted(shifting.primitives("median", ALL)), "exact").layers, before):
        for site in ALL:
            z, samples = old.statistics[site].samples.double() - layer.statistics[site].samples.double(), old.statistics[site].samples
            if site == "output_input":
                shape = layer.shape
                samples = torch.cat(samples.view(len(samples), shape.kv_heads, -1, shape.head_dim).unbind(2)).flatten(1)
            wanted = widened(samples.double().quantile(0.5, dim=0), site, layer.shape)
            assert torch.allclose(z, wanted.expand_as(z), atol=1e-5 * samples.abs().max())


@pytest.mark.parametrize("center, held", [("median", True), ("mean", False), ("midrange", False)])
def test_a_few_massive_tokens_do_not_move_the_median(center, held, layer):
    """First tokens whose activation exceeds all others ten thousandfold, in the share that a token sample holds them."""
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


def test_a_shift_at_output_input_costs_nothing_online(given):  # noqa: F811
    made = given(LLAMA)
    result = folded(made, made.fitted(shifting.primitives("midrange", ALL)))
    assert {site: [operation["operation"] for operation in result.online[0, site]] for site in ALL} == {
        site: [] if site == "output_input" else ["subtract"] for site in ALL}
    biases = {name.split(".")[-2] for name in result.state if name.endswith(".bias")}
    assert biases == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("forgotten", ["q_proj.bias", "o_proj.bias", "v_proj.bias", "down_proj.bias", "up_proj.bias", "online"])
def test_a_forgotten_part_of_a_shift_shows(forgotten, given):  # noqa: F811
    made = given(LLAMA)
    result = folded(made, made.fitted(shifting.primitives("midrange", ALL)))
    assert changed(made, result) < 1e-9
    state = {name: tensor for name, tensor in result.state.items() if not name.endswith(forgotten)}
    assert changed(made, Folded(state, {} if forgotten == "online" else result.online)) > 1e-6


def test_the_shift_comes_before_r4(given):  # noqa: F811
    made = given(LLAMA)
    result = folded(made, made.fitted([*shifting.primitives("midrange", ALL), *random_hadamard.primitives(0)]))
    assert [operation["operation"] for operation in result.online[1, "down_input"]] == ["subtract", "hadamard"]
    assert [operation["operation"] for operation in result.online[1, "mlp_input"]] == ["subtract"]  # R1 turned the shift itself


# -- searches ------------------------------------------------------------------------------------------------------------------------------


def defined_error(weights: list[Tensor], x: Tensor, s: Tensor, schemes: CellSchemes, site: str, activations: bool) -> float:
    """The objective from its definition, on the tokens themselves: |x Eᵀ|² / |x Wᵀ|² + |(Q(x/s) - x/s) Ŵᵀ|² / |x Wᵀ|²."""
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
    error = OutputError(weights, statistics_of(x), schemes, "mlp_input", activations)
    assert math.isclose(error(s), defined_error(weights, x, s, schemes, "mlp_input", activations), rel_tol=1e-3)
    assert OutputError(weights, statistics_of(x), NOTHING, "mlp_input", activations)(s) == 0.0


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
        error = OutputError([layer.weights[linear] for linear in SITES[site]], layer.statistics[site], schemes, site, primitive.round_activations)
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
        torch.ones(64, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0))
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
                assert torch.equal(wide, torch.maximum(torch.ones_like(wide), torch.maximum(extremes.maximum / t, -extremes.minimum / t)))
            last = t
        assert math.isclose(last, 0.1, rel_tol=1e-9)


def test_the_schemes_of_the_cell_are_not_kept(given, tmp_path):  # noqa: F811
    made = given(LLAMA)
    transform = made.fitted([SearchedPower(ALL, 2, False, INT4), SearchedClip(["o"], 2, INT4)])
    transform.save(tmp_path / "transform.safetensors")
    loaded = Transform.load(tmp_path / "transform.safetensors")
    assert loaded.primitives == transform.primitives and loaded.primitives[0].cell is None and transform.primitives[0].cell is INT4
    one, other = folded(made, transform), folded(made, loaded)
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())


def group_errors(used: Tensor, weight: Tensor, moment: Tensor, size: int, schemes: CellSchemes) -> Tensor:
    """(m, groups): e C eᵀ of every row and group of ``used`` once it is rounded, against ``weight``."""
    change = (fake_quantize(used, schemes.weight) - weight).double()
    starts = range(0, len(moment), size)
    return torch.stack([(change[:, i: i + size] @ moment[i: i + size, i: i + size] * change[:, i: i + size]).sum(-1) for i in starts], -1)


@pytest.mark.parametrize("schemes", [INT4, GROUPS, CellSchemes(scheme("int4", granularity="tensor"))], ids=["channel", "group", "tensor"])
def test_clipped_weights_lose_less_of_the_output(schemes, layer):
    layer.weights["down"][3, 4] = 40.0  # an outlier weight whose row rounds to nothing unless it is clipped
    primitive = SearchedClip(["down", "o"], 10, schemes)
    bounds = primitive.fit_layer(layer)
    for linear, site in (("down", "down_input"), ("o", "output_input")):
        weight, moment = layer.weights[linear].float(), layer.statistics[site].second_moment
        rows, groups = bounds[linear].shape
        size, largest = weight.shape[1] // groups, weight.abs().unflatten(-1, (groups, -1)).amax(-1)
        assert (rows, groups) == schemes.weight.scale_shape(weight.shape)[-2:]
        largest = largest.amax(0, keepdim=True) if rows == 1 else largest
        assert bool((bounds[linear] <= largest).all()) and bool((bounds[linear] >= 0.5 * largest).all())
        before, after = (group_errors(used, weight, moment.double(), size, schemes) for used in (weight, clipped(weight, bounds[linear])))
        if rows == 1:
            before, after = before.sum(0), after.sum(0)
        assert bool((after <= before * (1 + 1e-3) + 1e-9).all()) and (rows == 1 or after.sum() < before.sum())
    assert SearchedClip(["down"], 10, NOTHING).fit_layer(layer) == {}


def test_clipping_limits_what_is_rounded_and_nothing_else(given):  # noqa: F811
    made = given(LLAMA)
    done = folded(made, made.fitted([SearchedClip(["up", "down"], 4, INT4)]))
    assert changed(made, done) == 0
    layer = done.layers[0]
    assert set(layer.clips) == {"up", "down"} and not torch.equal(layer.clips["up"](layer.weights["up"]), layer.weights["up"])
    assert not folded(made, made.fitted([SearchedClip(["up", "down"], 4, NOTHING)])).layers[0].clips


# -- rotations -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotations", [["R1"], ["R2"], ["R4"], ["R1", "R4"], ["R1", "R2"], []])
def test_rotations_are_turned_on_by_name(rotations):
    kinds = {"R1": RotateResidual, "R2": RotateHeads, "R4": RotateDown}
    for recipe in (random_hadamard, random_orthogonal):
        assert [type(primitive) for primitive in recipe.primitives(0, rotations)] == [kinds[name] for name in rotations]


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_haar_rotations_keep_lengths(case, given):  # noqa: F811
    made = given(case)
    transform = made.fitted(random_orthogonal.primitives(3))
    matrices = [transform.parameters["0.model.matrix"], *transform.parameters["1.0.matrices"]]
    for matrix in matrices:
        assert close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), 1e-12)
    result = folded(made, transform)
    rotated = run(result.state, made.config, made.tokens, result.online)[1]
    for index in range(made.decoder.shape.layers):
        for site in ALL:
            before = made.inputs[index, site]
            if site in NORM_OF:  # the gain is in the weights now
                before = before / made.decoder.layer(index).weights[NORM_OF[site]]
            assert close(rotated[index, site].norm(dim=-1), before.norm(dim=-1), 1e-9)
    assert len({tuple(matrix.flatten()[:4].tolist()) for matrix in transform.parameters["1.0.matrices"]}) == made.decoder.shape.kv_heads


@pytest.mark.parametrize("source", ["activations", "weights"])
def test_principal_axes_are_sorted_by_what_they_hold(source, given):  # noqa: F811
    made = given(LLAMA)
    primitive = RotatePrincipal("hadamard", 1, source)
    transform = made.fitted([primitive])
    basis = transform.parameters["0.model.basis"]
    assert close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), 1e-12)
    layers = [layer_state(made.decoder, index, made.statistics) for index in range(2)]
    total = 0.0
    for index, state in enumerate(layers):
        for site in NORMS:
            gain = state.weights["attention_norm" if site == "attention_input" else "mlp_norm"]
            x = made.inputs[index, site] / gain
            rows = torch.cat([state.weights[linear] for linear in SITES[site]]) * gain
            total = total + (x.T @ x / len(x) if source == "activations" else rows.T @ rows)
    seen = basis.T @ total @ basis
    assert close(seen, torch.diag(seen.diagonal()), 1e-5) and bool((seen.diagonal().diff() <= 1e-6 * seen.max()).all())


def test_shared_parameters_are_fitted_to_what_came_before(given):  # noqa: F811
    """Principal axes after a shift are those of the covariance, not of the second moment."""
    made = given(LLAMA)
    plain = made.fitted([RotatePrincipal("hadamard", 1, "activations")]).parameters["0.model.basis"]
    after = made.fitted([Shift("mean", NORMS), RotatePrincipal("hadamard", 1, "activations")])
    assert not close(after.parameters["1.model.basis"].abs(), plain.abs(), 1e-2)
    scaled = made.fitted([Scale(0.5, NORMS), RotatePrincipal("hadamard", 1, "activations")]).parameters["1.model.basis"]
    assert close(scaled.abs(), plain.abs(), 1e-2)  # a scaling of the gain is absorbed with it


def test_mixed_heads_after_rotated_ones_are_one_hadamard_matrix(given):  # noqa: F811
    """4 heads of 16: (I ⊗ H16)(H4 ⊗ I) = H64, what QuaRot calls the Hadamard heads."""
    made = given(LLAMA)
    result = folded(made, made.fitted([RotateHeads(0, "plain"), MixHeads(0, "hadamard")]))
    rotated = run(result.state, made.config, made.tokens, result.online)[1]
    for index in range(2):
        assert close(rotated[index, "output_input"], made.inputs[index, "output_input"] @ hadamard_matrix(64) / 8, 1e-9)
    assert [type(p) for p in quarot.primitives(0)] == [RotateResidual, RotateHeads, MixHeads, RotateDown]


def test_mixing_heads_needs_their_hadamard_matrix(given):  # noqa: F811
    made = given(next(case for case in CASES if case.heads == 9))
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 9"):
        made.fitted([MixHeads(0, "hadamard"), Scale(0.5, NORMS)])


# -- blocks --------------------------------------------------------------------------------------------------------------------------------


def test_a_block_rotation_keeps_an_outlier_in_its_block():
    x = torch.zeros(3, 64, dtype=torch.float64).index_fill(1, torch.tensor([21]), 8.0)
    found = apply({"operation": "block_hadamard", "size": 16}, x)
    assert bool((found[:, 16:32].abs() == 2).all()) and not found[:, :16].any() and not found[:, 32:].any()
    everywhere = apply({"operation": "hadamard"}, x)
    assert bool((everywhere.abs() == 1).all())


def test_the_fold_into_v_spares_the_online_operation(given):  # noqa: F811
    made = given(LLAMA)
    kept, spared = (folded(made, made.fitted(block_hadamard.primitives(16, ALL, fold))) for fold in (False, True))
    assert [len(kept.online[0, site]) for site in ALL] == [1, 1, 1, 1] and [len(spared.online[0, site]) for site in ALL] == [1, 0, 1, 1]
    for index in range(2):
        assert close(run(kept.state, made.config, made.tokens, kept.online)[1][index, "output_input"],
                     run(spared.state, made.config, made.tokens, spared.online)[1][index, "output_input"], 1e-9)
    wide = folded(made, made.fitted(block_hadamard.primitives(32, ["output_input"], True)))  # a head has 16 channels
    assert len(wide.online[0, "output_input"]) == 1


@pytest.mark.parametrize("primitive", [BlockHadamard(128, ["down_input"], False), GreedyBlocks(40, ["down_input"], 1, 0, 1, True)])
def test_blocks_have_to_divide_a_site(primitive, given):  # noqa: F811
    with pytest.raises(ConfigError, match=r"do not divide the 96 inputs of site 'down_input'"):
        given(LLAMA).fitted([primitive])


@pytest.mark.parametrize("size", [2, 16, 48])
def test_a_spreading_matrix_is_orthogonal_and_starts_uniform(size):
    matrix = spreading_matrix(size, 0)
    assert close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), 1e-12)
    assert close(matrix[0], torch.full((size,), size**-0.5, dtype=torch.float64), 1e-12)
    assert torch.equal(matrix, spreading_matrix(size, 0)) and (size == 2 or not torch.equal(matrix, spreading_matrix(size, 1)))


@pytest.mark.parametrize("size", [16, 48])
def test_the_greedy_rotation_lowers_the_peak_of_every_block(size):
    x = heavy(100, 96)
    rotation = greedy_rotation(x, spreading_matrix(size, 0), 40)
    assert rotation.shape == (96 // size, size, size)
    assert close(rotation @ rotation.mT, torch.eye(size, dtype=torch.float64).expand_as(rotation), 1e-11)
    before, after = (t.unflatten(-1, (-1, size)).abs().amax((0, 2)) for t in (x, apply({"operation": "block_rotate", "blocks": rotation}, x)))
    assert bool((after <= before * (1 + 1e-6)).all()) and bool((after[before > 10] < 0.8 * before[before > 10]).all())
    assert torch.equal(greedy_rotation(x, spreading_matrix(size, 0), 0), torch.eye(size, dtype=torch.float64).expand_as(rotation))


def test_a_shared_rotation_is_that_of_all_blocks_as_one():
    x, spread = heavy(50, 96), spreading_matrix(16, 0)
    shared = greedy_rotation(x, spread, 20, shared=True)
    assert torch.equal(shared, greedy_rotation(x.reshape(-1, 16), spread, 20)) and shared.shape == (1, 16, 16)
    rotated = apply({"operation": "block_rotate", "blocks": shared}, x)
    assert close(rotated, apply({"operation": "block_rotate", "blocks": shared.repeat(6, 1, 1)}, x), 1e-12)
    assert rotated.abs().max() < 0.8 * x.abs().max()


def test_one_step_spreads_a_single_peak_evenly():
    x = torch.zeros(5, 32, dtype=torch.float64).index_fill(1, torch.tensor([7, 20]), 4.0)
    rotation = greedy_rotation(x, spreading_matrix(16, 3), 1)
    assert close(apply({"operation": "block_rotate", "blocks": rotation}, x).abs(), torch.ones(5, 32, dtype=torch.float64), 1e-6)


def test_a_rotation_that_does_not_help_is_left_out():
    even = torch.ones(4, 16, dtype=torch.float64) * torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)[:, None]
    assert torch.equal(greedy_rotation(even, spreading_matrix(16, 0), 20), torch.eye(16, dtype=torch.float64)[None])


def test_zigzag_deals_back_and_forth():
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    values = heavy(1, 192)[0].abs()
    for size in (16, 48, 192):
        order = zigzag(values, size)
        assert sorted(order.tolist()) == list(range(192))
        sums = values[order].view(-1, size).sum(-1)
        assert size == 192 or sums.max() - sums.min() <= values.max() - values.min() + 1e-12


# -- reordering ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["across", "within"])
@pytest.mark.parametrize("case", VARIED, ids=str)
def test_channels_are_in_ascending_order(case, heads, given):  # noqa: F811
    made = given(case)
    result = folded(made, made.fitted(reordering.primitives("rms", ALL, heads)), "file")
    for layer in result.layers:
        assert [bool(layer.online[site]) for site in ALL] == [True, heads == "across", True, False]
        for site in ALL:
            sizes = layer.statistics[site].magnitude("rms")
            if site == "output_input" and heads == "within":
                sizes = sizes.view(layer.shape.kv_heads, -1, layer.shape.head_dim).amax(1)
            assert bool((sizes.diff() >= 0).all())


def test_an_order_changes_nothing_for_whole_rows_and_something_for_groups(given):  # noqa: F811
    made = given(LLAMA)
    transform = made.fitted([Reorder("rms", ALL, "across")])
    plain, sorted_ = made.decoder.layer(0), folded(made, transform).layers[0]
    order = transform.parameters["0.0.mlp_input"]
    rows = sorted_.weights["up"][transform.parameters["0.0.down_input"].argsort()]
    whole, grouped = (rtn(rows, None, used) for used in (INT4.weight, GROUPS.weight))
    assert torch.equal(whole.dequantized(), rtn(plain.weights["up"], None, INT4.weight).dequantized()[:, order])
    assert not torch.equal(grouped.dequantized(), rtn(plain.weights["up"], None, GROUPS.weight).dequantized()[:, order])


# -- what may follow what ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late, site, operation", [
    (lambda: RotateResidual("hadamard", 0), "attention_input", "block_hadamard"), (lambda: RotateHeads(0), "output_input", "block_hadamard"),
    (lambda: Scale(0.5, ["down_input"]), "down_input", "block_hadamard"), (lambda: Shift("mean", ["output_input"]), "output_input", "block_hadamard"),
    (lambda: Reorder("rms", ["down_input"], "across"), "down_input", "block_hadamard")])
def test_what_is_folded_in_before_a_site_cannot_follow_what_is_online_there(late, site, operation, given):  # noqa: F811
    with pytest.raises(ConfigError, match=f"'{site}' cannot follow the online '{operation}'"):
        given(LLAMA).fitted([BlockHadamard(16, ALL, False), late(), Scale(0.5, [])])


def test_scaling_divides_an_online_shift(given):  # noqa: F811
    made = given(LLAMA)
    transform = made.fitted([Shift("midrange", NORMS), Scale(0.5, NORMS)])
    result = folded(made, transform)
    shift = result.online[0, "mlp_input"][0]["shift"]
    assert close(shift, transform.parameters["0.0.mlp_input"] / transform.parameters["1.0.mlp_input"], 1e-12)


# -- online operations ---------------------------------------------------------------------------------------------------------------------

OPERATIONS = [
    ({"operation": "hadamard"}, 96 * (3 + 12)), ({"operation": "block_hadamard", "size": 16}, 96 * 4),
    ({"operation": "block_hadamard", "size": 12}, 96 * 12),
    ({"operation": "head_hadamard", "heads": 12}, 96 * 12), ({"operation": "head_rotate", "matrix": spreading_matrix(6, 9)}, 96 * 12),
    ({"operation": "subtract", "shift": heavy(1, 96)[0]}, 96),
    ({"operation": "gather", "order": torch.randperm(96, generator=torch.Generator().manual_seed(0))}, 0),
    ({"operation": "block_rotate", "blocks": torch.stack([spreading_matrix(24, seed) for seed in range(4)])}, 96 * 48),
    ({"operation": "block_rotate", "blocks": spreading_matrix(24, 0)[None]}, 96 * 48),
    ({"operation": "kronecker", "left": heavy(8, 8) / 4, "right": heavy(12, 12) / 4}, 96 * 2 * (8 + 12)),
    ({"operation": "kronecker", "left": heavy(8, 8) / 4}, 96 * 2 * 8),
]


@pytest.mark.parametrize("operation, count", OPERATIONS, ids=lambda value: str(value.get("operation")) if isinstance(value, dict) else "")
def test_an_operation_is_its_matrix_in_every_dtype(operation, count):
    x = heavy(7, 96).view(7, 1, 96)
    assert close(apply(operation, x), apply_online([operation], x), 1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        found = as_rows(operation)(x.to(dtype))
        assert found.dtype == dtype and found.shape == x.shape and close(found.double(), apply_online([operation], x), 0.05)
    assert arithmetic(operation, 96) == count


def test_every_operation_is_tested():
    assert {operation["operation"] for operation, _ in OPERATIONS} == set(ONLINE)


def test_smoothing_factors_keep_dead_channels():
    s = smoothing_factors(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 2.0, 1.0]


def test_fitting_all_layers_together_needs_no_other_statistics(given):  # noqa: F811
    made = given(LLAMA)
    transform = fit(random_orthogonal.primitives(0, ["R1", "R4"], basis="weights"), made.decoder, None)
    assert changed(made, folded(made, transform)) < 1e-9
