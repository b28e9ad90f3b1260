"""Every transform leaves the function as it is, and the statistics that it predicts are those of the transformed model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantgrid.architecture import END_ROLES, SITES, layer_tensors
from quantgrid.cell_schemes import CellSchemes
from quantgrid.decoders import DecoderFolder, DecoderLayer
from quantgrid.errors import ConfigError, NumericalFailure
from quantgrid.hadamard import random_orthogonal as haar
from quantgrid.mitigations.gptq import gptq
from quantgrid.quantizer import activation_scheme, scheme
from quantgrid.statistics import SiteStatistics
from quantgrid.storage import read_tensors, write_tensors
from quantgrid.transforms import (
    awq,
    block_hadamard,
    duquant,
    fold_norms,
    none,
    outlier_suppression_plus,
    quarot,
    random_hadamard,
    random_orthogonal,
    reordering,
    rotation_then_scaling,
    scaling,
    shifting,
)
from quantgrid.transforms.block_rotate import GreedyBlocks
from quantgrid.transforms.composition import Transform, derived_seed, fit, layer_state
from quantgrid.transforms.reorder import Reorder, Zigzag
from quantgrid.transforms.rotate import RotateDown, RotateHeads, RotateResidual
from quantgrid.transforms.scale import Scale, divide_input
from reference_decoder import logits, site_inputs
from reference_statistics import close, run, statistics_of, write_statistics
from selection import others_slow
from tiny_decoders import CASES, Case, random_tokens, save

NORMS, ALL = ["attention_input", "mlp_input"], list(SITES)
INT4 = CellSchemes(scheme("int4"), {site: [activation_scheme("int4")] for site in SITES})


RECIPES: dict[str, Callable[[], list]] = {
    "none": none.primitives,
    "norms folded": fold_norms.primitives,
    "smoothquant": lambda: scaling.primitives(0.5, NORMS),
    "scaling of all sites": lambda: scaling.primitives(0.7, ALL),
    "R1 hadamard": lambda: [RotateResidual("hadamard", 1)],
    "R1 orthogonal": lambda: [RotateResidual("orthogonal", 2)],
    "R2": lambda: [RotateHeads(3)],
    "R4": lambda: [RotateDown()],
    "random hadamard": lambda: random_hadamard.primitives(4),
    "scaling, then random hadamard": lambda: [*scaling.primitives(0.5, ALL), *random_hadamard.primitives(5)],
    "random hadamard, then scaling": lambda: [*random_hadamard.primitives(6), *scaling.primitives(0.5, [*NORMS, "output_input"])],
    "two rotations": lambda: [RotateResidual("orthogonal", 7), RotateHeads(8), RotateResidual("hadamard", 9), RotateHeads(10)],
    "R4 twice": lambda: [RotateDown(), Scale(0.3, ["output_input"]), RotateHeads(11), Scale(0.6, ["output_input"]), RotateDown()],
    "shifting": lambda: shifting.primitives("midrange", ALL),
    "shifting by the mean": lambda: shifting.primitives("mean", ALL),
    "searched scaling": lambda: scaling.primitives(0.5, ALL, "mean", True, 3, True, schemes=INT4),
    "awq": lambda: awq.primitives(ALL, 3, False, False, schemes=INT4),
    "outlier suppression plus": lambda: outlier_suppression_plus.primitives(ALL, ALL, "midrange", 3, 0.1, True, schemes=INT4),
    "random orthogonal": lambda: random_orthogonal.primitives(12),
    "random orthogonal, hadamard heads": lambda: random_orthogonal.primitives(13, heads="hadamard"),
    "principal axes of activations": lambda: random_hadamard.primitives(14, basis="activations"),
    "principal axes of weights": lambda: random_orthogonal.primitives(15, ["R1"], basis="weights"),
    "quarot": lambda: quarot.primitives(16),
    "quarot, orthogonal mixing": lambda: quarot.primitives(16, "orthogonal"),
    "block hadamard": lambda: block_hadamard.primitives(16, ALL, False),
    "block hadamard, heads folded": lambda: block_hadamard.primitives(16, ALL, True),
    "duquant": lambda: duquant.primitives(17, 0.6, 16, 8, ALL, True),
    "duquant, a rotation per block": lambda: duquant.primitives(17, 0.6, 16, 8, ALL, False),
    "reorder": lambda: reordering.primitives("rms", ALL, "across"),
    "reorder within heads": lambda: reordering.primitives("maximum", ALL, "within"),
    "rotation, then scaling": lambda: rotation_then_scaling.primitives(18, 0.5, [*NORMS, "output_input"], "maximum"),
    "shifting, then random hadamard": lambda: [*shifting.primitives("midrange", ALL), *random_hadamard.primitives(19)],
    "random hadamard, then shifting": lambda: [*random_hadamard.primitives(20), *shifting.primitives("mean", ALL)],
    "shifted, scaled, reordered, rotated": lambda: [*shifting.primitives("mean", ALL), *scaling.primitives(0.5, ALL),
                                                    *reordering.primitives("mean", ["down_input", "output_input"], "within"),
                                                    *random_hadamard.primitives(21, basis="activations")],
    "reordered, then in blocks": lambda: [*reordering.primitives("rms", ALL, "across"), *block_hadamard.primitives(16, ALL, False)],
    "in blocks, then shifted": lambda: [*block_hadamard.primitives(16, [*NORMS, "down_input"], False), *shifting.primitives("midrange", ALL)],
    "shifted, rotated, shifted, in blocks": lambda: [*shifting.primitives("midrange", ["output_input"]), RotateHeads(22, "plain"),
                                                     *shifting.primitives("mean", ALL), GreedyBlocks(16, ["output_input"], 3, 23, 1, False),
                                                     Zigzag(16, ALL), Reorder("rms", ["attention_input"], "across")],
}


def fits(recipe: str, case: Case) -> bool:
    return recipe != "quarot" or case.heads != 9


VARIED = [next(case for case in CASES if case.architecture.startswith(name) and want(case)) for name, want in
          (("Llama", lambda c: c.heads == 9 and c.tied), ("Llama", lambda c: c.bias), ("Qwen2", lambda c: not c.tied), ("Qwen3", lambda c: c.bias),
           ("Mistral", lambda c: c.head_dim == 32))]


HARDEST = VARIED[1]  # all biases, a tied embedding, grouped queries
EVERY_KIND = "shifted, scaled, reordered, rotated"


def decisive(case: Case, recipe: str) -> bool:
    """Every recipe on the hardest case, every case with all kinds of primitives, and the order that no Hadamard matrix has."""
    return case == HARDEST or recipe == EVERY_KIND or (recipe == "quarot" and case == VARIED[0])


@dataclass
class Given:
    """A case on disk in float64, its logits, what its linears read, and that as a calibration file."""

    case: Case
    folder: Path
    config: dict
    state: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor
    inputs: dict[tuple[int, str], Tensor]
    statistics: Path

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)

    def fitted(self, primitives: list) -> Transform:
        return fit(primitives, self.decoder, self.statistics)


@dataclass
class Folded:
    """A transformed decoder: its tensors, the operations that remain online, and the statistics in closed form."""

    state: dict[str, Tensor] = field(default_factory=dict)
    online: dict[tuple[int, str], list[dict]] = field(default_factory=dict)
    layers: list[DecoderLayer] = field(default_factory=list)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Callable[[Case], Given]:
    """Case -> :class:`Given`, made once."""

    @cache
    def make(case: Case) -> Given:
        config, state = case.build()
        folder = save(tmp_path_factory.mktemp("case"), config, state, torch.float64)
        tokens = random_tokens(config, 16, 24)
        inputs = site_inputs(state, config, tokens)
        return Given(case, folder, config, state, tokens, logits(state, config, tokens[:2]), inputs, write_statistics(folder / "statistics", inputs))

    return make


def folded(made: Given, transform: Transform, statistics: str | None = None) -> Folded:
    """``made`` under ``transform``, without statistics, with ``exact`` ones in float64 of all tokens, or with those of the calibration ``file``."""
    result, decoder = Folded(), made.decoder
    for index in range(decoder.shape.layers):
        layer = layer_state(decoder, index, made.statistics if statistics == "file" else None)
        if statistics == "exact":
            layer.statistics = {site: statistics_of(made.inputs[index, site]) for site in SITES}
        transform.fold_layer(layer)
        result.layers.append(layer)
        names = layer_tensors(decoder.shape.architecture, index)
        result.state |= {names[role]: tensor for role, tensor in layer.weights.items()}
        result.online |= {(index, site): operations for site, operations in layer.online.items()}
    ends = decoder.ends()
    transform.fold_ends(ends)
    result.state |= {END_ROLES[role]: tensor for role, tensor in ends.items()}
    return result


def changed(made: Given, result: Folded) -> float:
    """Largest difference of the logits of two windows, relative to the largest logit."""
    found, _ = run(result.state, made.config, made.tokens[:2], result.online)
    return ((found - made.logits).abs().max() / made.logits.abs().max()).item()


@pytest.mark.parametrize("case, recipe", others_slow(product(CASES, RECIPES), decisive), ids=str)
def test_the_function_is_preserved(case, recipe, given):
    made = given(case)
    if not fits(recipe, case):
        with pytest.raises(ConfigError, match="no Hadamard matrix of order 9"):
            folded(made, made.fitted(RECIPES[recipe]()))
        return
    result = folded(made, made.fitted(RECIPES[recipe]()))
    assert set(made.state) <= set(result.state) and all(tensor.dtype == torch.float64 for tensor in result.state.values())
    assert changed(made, result) < 1e-9
    if recipe != "none":
        assert set(made.state) < set(result.state) or any(not torch.equal(tensor, result.state[name]) for name, tensor in made.state.items())


# -- what must not pass -----------------------------------------------------------------------------------------------------------------

LLAMA = next(case for case in CASES if case.architecture == "LlamaForCausalLM" and case.heads == 4 and case.tied)


def scaled_queries_and_keys(made: Given, paired: bool) -> dict[str, Tensor]:
    """q divided and k multiplied by factors per channel of a KV head; ``paired``: equal for the channels i and i + head_dim / 2 that RoPE turns."""
    generator, shape = torch.Generator().manual_seed(0), made.decoder.shape
    state = dict(made.state)
    for layer in range(shape.layers):
        s = torch.rand(shape.kv_heads, 1, shape.head_dim, generator=generator, dtype=torch.float64) + 0.5
        if paired:
            s[..., shape.head_dim // 2:] = s[..., : shape.head_dim // 2]
        names = layer_tensors(shape.architecture, layer)
        per_query = s.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1, 1)
        state[names["q"]], state[names["k"]] = state[names["q"]] / per_query, state[names["k"]] * s.reshape(-1, 1)
    return state


def test_query_key_scales_must_be_paired(given):
    made = given(LLAMA)
    assert changed(made, Folded(scaled_queries_and_keys(made, paired=True))) < 1e-9
    assert changed(made, Folded(scaled_queries_and_keys(made, paired=False))) > 1e-3


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_centering_the_embedding_is_not_a_transform(case, given):
    made = given(case)
    result = folded(made, made.fitted([RotateResidual("hadamard", 1)]))
    embedding = made.state["model.embed_tokens.weight"]
    assert changed(made, result) < 1e-9
    head = made.state.get("lm_head.weight", embedding)
    centred = made.decoder.ends() | {"embedding": embedding - embedding.mean(-1, keepdim=True), "lm_head": head}
    made.fitted([RotateResidual("hadamard", 1)]).fold_ends(centred)
    assert changed(made, Folded({**result.state, END_ROLES["embedding"]: centred["embedding"]}, result.online)) > 1e-3


@pytest.mark.parametrize("case", [case for case in VARIED if case.kv_heads < case.heads], ids=str)
def test_a_rotation_per_query_head_does_not_fit_grouped_queries(case, given):
    """o takes a rotation of its own for every query head, v can follow only one of a group."""
    made = given(case)
    shape, per_head, per_group = made.decoder.shape, dict(made.state), dict(made.state)
    for layer in range(shape.layers):
        names = layer_tensors(shape.architecture, layer)
        rotations = torch.stack([haar(shape.head_dim, 100 * layer + head) for head in range(shape.heads)])
        leading = rotations[:: shape.heads // shape.kv_heads]
        shared = leading.repeat_interleave(shape.heads // shape.kv_heads, 0)
        for role in ("v", "v_bias"):
            if names.get(role) in made.state:
                tensor = made.state[names[role]]
                rows = tensor.unflatten(0, (shape.kv_heads, shape.head_dim))
                turned = torch.einsum("hij,hi...->hj...", leading, rows).flatten(0, 1)
                per_head[names[role]] = per_group[names[role]] = turned
        columns = made.state[names["o"]].unflatten(1, (shape.heads, shape.head_dim))
        per_head[names["o"]], per_group[names["o"]] = (torch.einsum("mhi,hij->mhj", columns, used).flatten(1) for used in (rotations, shared))
    assert changed(made, Folded(per_group)) < 1e-9
    assert changed(made, Folded(per_head)) > 1e-3


@pytest.mark.parametrize("case", [case for case in VARIED if case.tied], ids=str)
def test_a_fold_into_a_tied_embedding_is_wrong(case, given):
    made = given(case)
    result = folded(made, made.fitted([RotateResidual("hadamard", 1)]))
    assert "lm_head.weight" not in made.state and changed(made, result) < 1e-9
    for kept in ("model.embed_tokens.weight", "lm_head.weight"):
        tied = {name: tensor for name, tensor in result.state.items() if name != "lm_head.weight"}
        assert changed(made, Folded({**tied, "model.embed_tokens.weight": result.state[kept]}, result.online)) > 1e-3


@pytest.mark.parametrize("role", ["o_bias", "down_bias", "v_bias", "up_bias"])
def test_a_forgotten_bias_shows(role, given):
    made = given(next(case for case in VARIED if case.bias and case.architecture == "LlamaForCausalLM"))
    result = folded(made, made.fitted([*scaling.primitives(0.5, ALL), *random_hadamard.primitives(1)]))
    name = layer_tensors(made.case.architecture, 0)[role]
    assert changed(made, result) < 1e-9
    assert changed(made, Folded({**result.state, name: made.state[name]}, result.online)) > 1e-6


def test_a_forgotten_online_operation_shows(given):
    made = given(LLAMA)
    assert changed(made, Folded(folded(made, made.fitted([RotateDown()])).state)) > 1e-3


# -- statistics in closed form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, recipe", others_slow(product(VARIED, [name for name in RECIPES if name != "none"]), decisive), ids=str)
def test_statistics_are_those_of_the_transformed_model(case, recipe, given):
    made, recipe = given(case), recipe if fits(recipe, case) else "R2"
    result = folded(made, made.fitted(RECIPES[recipe]()), "exact")
    for (index, site), x in run(result.state, made.config, made.tokens, result.online)[1].items():
        ours, wanted = result.layers[index].statistics[site], statistics_of(x)
        assert ours.count == wanted.count
        for name in ("second_moment", "mean_absolute", "minimum", "maximum", "samples"):
            assert close(getattr(ours, name), getattr(wanted, name), 1e-9), (index, site, name)
        assert close(ours.mean + wanted.mean_absolute, wanted.mean + wanted.mean_absolute, 1e-9)


@pytest.mark.parametrize("recipe, mixed", [("smoothquant", []), ("scaling of all sites", []), ("R2", ["output_input"]), ("R4", ["down_input"]),
                                           ("R1 hadamard", NORMS), ("random hadamard", ALL), ("shifting", ALL), ("reorder", []),
                                           ("reorder within heads", []), ("block hadamard", ALL), ("duquant", ALL), ("awq", [])])
def test_only_mixed_sites_are_estimated(recipe, mixed, given):
    made = given(LLAMA)
    layer = folded(made, made.fitted(RECIPES[recipe]()), "file").layers[1]
    assert [site for site in ALL if layer.statistics[site].estimated] == mixed


@pytest.mark.parametrize("statistics", ["exact", "file"])
@pytest.mark.parametrize("recipe", ["scaling of all sites", "random hadamard", "random hadamard, then scaling", "outlier suppression plus", "duquant",
                                    "reorder", "block hadamard", "principal axes of activations"])
@pytest.mark.parametrize("case", VARIED[:2], ids=str)
def test_gptq_from_the_closed_form_gives_the_codes_of_the_transformed_model(case, recipe, statistics, given):
    """A rounding that falls the other way changes the rest of its row; with float32 moments, divided by small gains, a few rows may."""
    made = given(case)
    result = folded(made, made.fitted(RECIPES[recipe]()), statistics)
    _, inputs = run(result.state, made.config, made.tokens, result.online)
    equal = total = 0
    for layer in result.layers:
        for site, linears in SITES.items():
            weight = torch.cat([layer.weights[linear] for linear in linears])
            predicted, collected = (gptq(weight, used, scheme("int4")).quantized.codes
                                    for used in (layer.statistics[site], statistics_of(inputs[layer.index, site])))
            equal, total = equal + int((predicted == collected).sum()), total + weight.numel()
    assert equal / total >= (0.9995 if "principal" in recipe and statistics == "file" else 0.9999)


def test_a_diagonal_of_the_second_moment_is_not_enough(given):
    """Rotation makes it dense: GPTQ on its diagonal alone gives other codes."""
    made = given(LLAMA)
    layer = folded(made, made.fitted(random_hadamard.primitives(1)), "exact").layers[0]
    statistics = layer.statistics["down_input"]
    diagonal = SiteStatistics(**{**vars(statistics), "second_moment": torch.diag(statistics.second_moment.diagonal()), "memory": {}})
    codes = [gptq(layer.weights["down"], used, scheme("int4")).quantized.codes for used in (statistics, diagonal)]
    assert (codes[0] == codes[1]).float().mean() < 0.99


# -- scaling -------------------------------------------------------------------------------------------------------------------------------


def weights_at(layer: DecoderLayer, site: str) -> Tensor:
    """Largest magnitude per input channel of the linears of a site; at output_input per KV channel, repeated."""
    return shared_in_group(layer, site, torch.cat([layer.weights[linear].abs() for linear in SITES[site]]).amax(0))


def shared_in_group(layer: DecoderLayer, site: str, values: Tensor) -> Tensor:
    if site != "output_input":
        return values
    shape = layer.shape
    heads = values.view(shape.kv_heads, -1, shape.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)


@pytest.mark.parametrize("site", ALL)
@pytest.mark.parametrize("case", VARIED[:2], ids=str)
def test_smoothquant_equalizes_weights_activations_or_both(case, site, given):
    made = given(case)
    for alpha in (0.0, 0.5, 1.0):
        layer = folded(made, made.fitted([Scale(alpha, [site])]), "file").layers[1]
        activation, weight = shared_in_group(layer, site, layer.statistics[site].maximum_absolute), weights_at(layer, site)
        if alpha < 1:
            assert close(weight, torch.ones_like(weight) if alpha == 0 else activation, 1e-9)
        if alpha > 0:
            assert close(activation, torch.ones_like(weight) if alpha == 1 else weight, 1e-9)


def test_a_channel_that_is_always_zero_keeps_its_scale(given):
    made = given(LLAMA)
    layer = layer_state(made.decoder, 0, made.statistics)
    layer.statistics["mlp_input"] = layer.statistics["mlp_input"].transformed(torch.ones(64, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0))
    for linear in ("gate", "up"):
        layer.weights[linear][:, 5] = 0
    for alpha in (0.0, 0.5, 1.0):
        s = Scale(alpha, ["mlp_input"]).fit_layer(layer)["mlp_input"]
        assert s[3] == 1 and s[5] == 1 and bool((torch.isfinite(s) & (s > 0)).all())


@pytest.mark.parametrize("online_first", [lambda: [RotateDown()], lambda: random_hadamard.primitives(1)], ids=["R4", "random hadamard"])
def test_scaling_after_an_online_operation_is_refused(online_first, given):
    made = given(LLAMA)
    with pytest.raises(ConfigError, match=r"'down_input' cannot follow the online 'hadamard'"):
        made.fitted([*online_first(), Scale(0.5, ALL)])
    layer = made.decoder.layer(0)
    RotateDown().fold_layer(layer, {})
    with pytest.raises(ConfigError, match="scale first"):
        divide_input(layer, "down_input", torch.ones(96, dtype=torch.float64))


def test_absorbing_a_norm_takes_back_a_scale_in_it(given):
    """R1 makes all gains 1, so a scaling of the norm outputs before it leaves no trace: it belongs after the rotation."""
    made = given(LLAMA)
    plain, scaled = (folded(made, made.fitted([*before, RotateResidual("hadamard", 1)])).state for before in ([], [Scale(0.5, NORMS)]))
    assert all(close(scaled[name], tensor) for name, tensor in plain.items())


def test_a_gain_of_zero_is_absorbed(given, tmp_path):
    made = given(LLAMA)
    state = {name: tensor.clone() for name, tensor in made.state.items()}
    for name in state:
        if "layernorm" in name:
            state[name][7] = 0
    decoder = DecoderFolder(save(tmp_path, made.config, state, torch.float64))
    spoilt = Given(made.case, decoder.folder, made.config, state, made.tokens, logits(state, made.config, made.tokens[:2]),
                   site_inputs(state, made.config, made.tokens), made.statistics)
    result = folded(spoilt, spoilt.fitted([RotateResidual("hadamard", 1)]), "exact")
    assert changed(spoilt, result) < 1e-9
    for layer in result.layers:
        for statistics in layer.statistics.values():
            statistics.require_finite("a site")


# -- parameters ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "norms absorbed"])
def test_a_saved_transform_folds_the_same(recipe, given, tmp_path):
    made = given(VARIED[1])
    transform = made.fitted(RECIPES[recipe]())
    transform.save(tmp_path / "transform.safetensors", {"status": "ok"})
    loaded = Transform.load(tmp_path / "transform.safetensors")
    assert loaded.primitives == transform.primitives
    assert set(loaded.parameters) == set(transform.parameters)
    assert all(torch.equal(loaded.parameters[name], tensor) for name, tensor in transform.parameters.items())
    assert {tensor.dtype for tensor in transform.parameters.values()} <= {torch.float64, torch.int64}
    one, other = folded(made, transform), folded(made, loaded)
    assert same_operations(one.online, other.online) and all(close(other.state[name], tensor, 1e-13) for name, tensor in one.state.items())


def same_operations(one: dict, other: dict) -> bool:
    """Whether two decoders have the same online operations, tensors and all."""
    return {key: [operation.keys() for operation in listed] for key, listed in one.items()} == {
        key: [operation.keys() for operation in listed] for key, listed in other.items()} and all(
        torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        for key in one for ours, theirs in zip(one[key], other[key]) for name, value in ours.items())


def test_a_failed_fit_passes_its_reason_on(tmp_path):
    """What fit_transform leaves of a numerical failure."""
    write_tensors(tmp_path / "transform.safetensors", {}, {"status": "failed", "reason": "layers.3.down_input holds NaN"})
    with pytest.raises(NumericalFailure, match=r"layers\.3\.down_input holds NaN"):
        Transform.load(tmp_path / "transform.safetensors")


@pytest.mark.parametrize("kind", ["R1 hadamard", "R1 orthogonal", "R2", "random hadamard"])
def test_one_seed_one_rotation(kind, given):
    made = given(LLAMA)
    build = {"R1 hadamard": lambda seed: [RotateResidual("hadamard", seed)], "R1 orthogonal": lambda seed: [RotateResidual("orthogonal", seed)],
             "R2": lambda seed: [RotateHeads(seed)], "random hadamard": random_hadamard.primitives}[kind]
    one, again, other = (made.fitted(build(seed)).parameters for seed in (0, 0, 1))
    assert one and all(torch.equal(one[name], again[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_draws_are_independent_of_one_another(given):
    made = given(LLAMA)
    parameters = made.fitted(random_hadamard.primitives(0)).parameters
    assert sorted(parameters) == ["0.model.signs", "1.0.signs", "1.1.signs"]
    assert not torch.equal(parameters["1.0.signs"], parameters["1.1.signs"])
    alone = made.fitted([RotateHeads(0)]).parameters
    assert torch.equal(alone["0.0.signs"], parameters["1.0.signs"])
    assert len({derived_seed(0, "R1"), derived_seed(0, "R2", 0), derived_seed(0, "R2", 1), derived_seed(1, "R1"), derived_seed(0, "R2", 10)}) == 5
    assert 0 <= derived_seed(0, "R1") < 2**63


def test_parameters_are_small(given, tmp_path):
    """One number per channel at most: what goes to disk is signs and scales, never matrices or weights."""
    made = given(VARIED[0])
    shape = made.decoder.shape
    transform = made.fitted([*random_hadamard.primitives(0), *scaling.primitives(0.5, [*NORMS, "output_input"])])
    transform.save(tmp_path / "transform.safetensors")
    widths = shape.hidden_size + shape.layers * (2 * shape.hidden_size + 2 * shape.kv_heads * shape.head_dim)
    assert sum(tensor.numel() for tensor in read_tensors(tmp_path / "transform.safetensors").values()) == widths
    weights = sum(tensor.numel() for name, tensor in made.state.items() if "proj" in name)
    assert (tmp_path / "transform.safetensors").stat().st_size < 0.1 * 2 * weights


def test_fitting_without_a_need_for_the_layer_reads_none(given, monkeypatch):
    made = given(LLAMA)
    monkeypatch.setattr(DecoderFolder, "read", lambda *_: pytest.fail("a tensor was read"))
    assert fit(random_hadamard.primitives(0), made.decoder, None).parameters


@pytest.mark.parametrize("spoil", ["weights", "statistics"])
def test_what_is_not_finite_fails_the_fit(spoil, given, tmp_path):
    made = given(LLAMA)
    state, inputs = {name: tensor.clone() for name, tensor in made.state.items()}, {key: x.clone() for key, x in made.inputs.items()}
    if spoil == "weights":
        state["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    else:
        inputs[1, "down_input"][4, 5] = torch.inf
    decoder = DecoderFolder(save(tmp_path, made.config, state, torch.float64))
    with pytest.raises(NumericalFailure, match=r"model.layers.1.mlp.up_proj.weight|layers.1.down_input"):
        fit(scaling.primitives(0.5, NORMS), decoder, write_statistics(tmp_path / "statistics", inputs))
