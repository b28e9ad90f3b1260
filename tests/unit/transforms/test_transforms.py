"""Every transform leaves the function as it is, and the statistics that it predicts are those of
the transformed model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from quantgrid.calibration.layers import DecoderFolder, DecoderLayer
from quantgrid.calibration.statistics import SiteStatistics
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.storage import read_tensors, write_tensors
from quantgrid.inference.transform import PRIMITIVES, Primitive, derived_seed, fit, layer_state
from quantgrid.linalg.hadamard import random_orthogonal as haar
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.models.plans import END_ROLES, SITES
from quantgrid.models.shapes import layer_tensors
from quantgrid.schemes import scheme
from quantgrid.transforms.files import load_transform
from quantgrid.transforms.primitives.rotate import RotateDown, RotateHeads, RotateResidual
from quantgrid.transforms.primitives.scale import Scale, divide_input
from quantgrid.transforms.recipes import (
    random_hadamard,
    scaling,
)
from reference_decoder import logits, site_inputs
from reference_statistics import close, run, statistics_of, write_statistics
from selection import others_slow
from tiny_decoders import CASES, VARIED, save
from transform_cases import ALL, LLAMA, NORMS, RECIPES, Folded, Given, changed, decisive, fits, folded


@pytest.mark.parametrize("case, recipe", others_slow(product(CASES, RECIPES), decisive), ids=str)
def test_the_function_is_preserved(case, recipe, given):
    made = given(case)
    if not fits(recipe, case):
        with pytest.raises(ConfigError, match="no Hadamard matrix of order 9"):
            folded(made, made.fitted(RECIPES[recipe]()))
        return
    result = folded(made, made.fitted(RECIPES[recipe]()))
    assert set(made.state) <= set(result.state) and all(
        tensor.dtype == torch.float64 for tensor in result.state.values()
    )
    assert changed(made, result) < 1e-9
    if recipe != "none":
        assert set(made.state) < set(result.state) or any(
            not torch.equal(tensor, result.state[name]) for name, tensor in made.state.items()
        )


def scaled_queries_and_keys(made: Given, paired: bool) -> dict[str, Tensor]:
    """q divided and k multiplied by factors per channel of a KV head; ``paired``: equal for the
    channels i and i + head_dim / 2 that RoPE turns."""
    generator, shape = torch.Generator().manual_seed(0), made.decoder.shape
    state = dict(made.state)
    for layer in range(shape.layers):
        s = torch.rand(shape.kv_heads, 1, shape.head_dim, generator=generator, dtype=torch.float64) + 0.5
        if paired:
            s[..., shape.head_dim // 2 :] = s[..., : shape.head_dim // 2]
        names = layer_tensors(shape, layer)
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
    """o takes a separate rotation for every query head, v can follow only one per group."""
    made = given(case)
    shape, per_head, per_group = made.decoder.shape, dict(made.state), dict(made.state)
    for layer in range(shape.layers):
        names = layer_tensors(shape, layer)
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
        per_head[names["o"]], per_group[names["o"]] = (
            torch.einsum("mhi,hij->mhj", columns, used).flatten(1) for used in (rotations, shared)
        )
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
    name = layer_tensors(made.decoder.shape, 0)[role]
    assert changed(made, result) < 1e-9
    assert changed(made, Folded({**result.state, name: made.state[name]}, result.online)) > 1e-6


def test_a_forgotten_online_operation_shows(given):
    made = given(LLAMA)
    assert changed(made, Folded(folded(made, made.fitted([RotateDown()])).state)) > 1e-3


# -- statistics in closed form ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, recipe", others_slow(product(VARIED, [name for name in RECIPES if name != "none"]), decisive), ids=str
)
def test_statistics_are_those_of_the_transformed_model(case, recipe, given):
    made, recipe = given(case), recipe if fits(recipe, case) else "R2"
    result = folded(made, made.fitted(RECIPES[recipe]()), "exact")
    for (index, site), x in run(result.state, made.config, made.tokens, result.online)[1].items():
        ours, wanted = result.layers[index].statistics[site], statistics_of(x)
        assert ours.count == wanted.count
        for name in ("second_moment", "mean_absolute", "minimum", "maximum", "samples"):
            assert close(getattr(ours, name), getattr(wanted, name), 1e-9), (index, site, name)
        assert close(ours.mean + wanted.mean_absolute, wanted.mean + wanted.mean_absolute, 1e-9)


@pytest.mark.parametrize(
    "recipe, mixed",
    [
        ("smoothquant", []),
        ("scaling of all sites", []),
        ("R2", ["output_input"]),
        ("R4", ["down_input"]),
        ("R1 hadamard", NORMS),
        ("random hadamard", ALL),
        ("shifting", ALL),
        ("reorder", []),
        ("reorder within heads", []),
        ("block hadamard", ALL),
        ("duquant", ALL),
        ("perq", ALL),
        ("wush", ALL),
        ("awq", []),
    ],
)
def test_only_mixed_sites_are_estimated(recipe, mixed, given):
    made = given(LLAMA)
    layer = folded(made, made.fitted(RECIPES[recipe]()), "file").layers[1]
    assert [site for site in ALL if layer.statistics[site].estimated] == mixed


@pytest.mark.parametrize("statistics", ["exact", "file"])
@pytest.mark.parametrize(
    "recipe",
    [
        "scaling of all sites",
        "random hadamard",
        "random hadamard, then scaling",
        "outlier suppression plus",
        "duquant",
        "wush",
        "reorder",
        "block hadamard",
        "principal axes of activations",
    ],
)
@pytest.mark.parametrize("case", VARIED[:2], ids=str)
def test_gptq_from_the_closed_form_gives_the_codes_of_the_transformed_model(case, recipe, statistics, given):
    """A rounding that falls the other way changes the rest of its row; with float32 moments,
    divided by small gains, a few rows may."""
    made = given(case)
    result = folded(made, made.fitted(RECIPES[recipe]()), statistics)
    _, inputs = run(result.state, made.config, made.tokens, result.online)
    equal = total = 0
    for layer in result.layers:
        for site, linears in SITES.items():
            weight = torch.cat([layer.weights[linear] for linear in linears])
            predicted, collected = (
                gptq(weight, used, scheme("int4")).quantized.codes
                for used in (layer.statistics[site], statistics_of(inputs[layer.index, site]))
            )
            equal, total = equal + int((predicted == collected).sum()), total + weight.numel()
    assert equal / total >= (0.9995 if "principal" in recipe and statistics == "file" else 0.9999)


def test_a_diagonal_of_the_second_moment_is_not_enough(given):
    """Rotation makes it dense: GPTQ on its diagonal alone gives other codes."""
    made = given(LLAMA)
    layer = folded(made, made.fitted(random_hadamard.primitives(1)), "exact").layers[0]
    statistics = layer.statistics["down_input"]
    diagonal = SiteStatistics(
        **{**vars(statistics), "second_moment": torch.diag(statistics.second_moment.diagonal()), "memory": {}}
    )
    codes = [gptq(layer.weights["down"], used, scheme("int4")).quantized.codes for used in (statistics, diagonal)]
    assert (codes[0] == codes[1]).float().mean() < 0.99


# -- scaling ---------------------------------------------------------------------------------------


def weights_at(layer: DecoderLayer, site: str) -> Tensor:
    """Largest magnitude per input channel of the linears of a site; at output_input per KV channel,
    repeated."""
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
        activation, weight = (
            shared_in_group(layer, site, layer.statistics[site].maximum_absolute),
            weights_at(layer, site),
        )
        if alpha < 1:
            assert close(weight, torch.ones_like(weight) if alpha == 0 else activation, 1e-9)
        if alpha > 0:
            assert close(activation, torch.ones_like(weight) if alpha == 1 else weight, 1e-9)


def test_a_channel_that_is_always_zero_keeps_its_scale(given):
    made = given(LLAMA)
    layer = layer_state(made.decoder, 0, made.statistics)
    layer.statistics["mlp_input"] = layer.statistics["mlp_input"].transformed(
        torch.ones(64, dtype=torch.float64).index_fill(0, torch.tensor([3]), 0)
    )
    for linear in ("gate", "up"):
        layer.weights[linear][:, 5] = 0
    for alpha in (0.0, 0.5, 1.0):
        s = Scale(alpha, ["mlp_input"]).fit_layer(layer)["mlp_input"]
        assert s[3] == 1 and s[5] == 1 and bool((torch.isfinite(s) & (s > 0)).all())


@pytest.mark.parametrize(
    "online_first", [lambda: [RotateDown()], lambda: random_hadamard.primitives(1)], ids=["R4", "random hadamard"]
)
def test_scaling_after_an_online_operation_is_refused(online_first, given):
    made = given(LLAMA)
    with pytest.raises(ConfigError, match=r"cannot fold into the weights before 'down_input': the online 'hadamard'"):
        made.fitted([*online_first(), Scale(0.5, ALL)])
    layer = made.decoder.layer(0)
    RotateDown().fold_layer(layer, {})
    with pytest.raises(ConfigError, match="scale first"):
        divide_input(layer, "down_input", torch.ones(96, dtype=torch.float64))


def test_absorbing_a_norm_takes_back_a_scale_in_it(given):
    """R1 makes all gains 1, so a scaling of the norm outputs before it leaves no trace: it belongs
    after the rotation."""
    made = given(LLAMA)
    plain, scaled = (
        folded(made, made.fitted([*before, RotateResidual("hadamard", 1)])).state
        for before in ([], [Scale(0.5, NORMS)])
    )
    assert all(close(scaled[name], tensor) for name, tensor in plain.items())


def test_a_gain_of_zero_is_absorbed(given, tmp_path):
    made = given(LLAMA)
    state = {name: tensor.clone() for name, tensor in made.state.items()}
    for name in state:
        if "layernorm" in name:
            state[name][7] = 0
    decoder = DecoderFolder(save(tmp_path, made.config, state, torch.float64))
    spoilt = Given(
        made.case,
        decoder.folder,
        made.config,
        state,
        made.tokens,
        logits(state, made.config, made.tokens[:2]),
        site_inputs(state, made.config, made.tokens),
        made.statistics,
    )
    result = folded(spoilt, spoilt.fitted([RotateResidual("hadamard", 1)]), "exact")
    assert changed(spoilt, result) < 1e-9
    for layer in result.layers:
        for statistics in layer.statistics.values():
            statistics.require_finite("a site")


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "norms absorbed"])
def test_a_saved_transform_folds_the_same(recipe, given, tmp_path):
    made = given(VARIED[1])
    transform = made.fitted(RECIPES[recipe]())
    transform.save(tmp_path / "transform.safetensors", {"status": "ok"})
    loaded = load_transform(tmp_path / "transform.safetensors")
    assert loaded.primitives == transform.primitives
    assert set(loaded.parameters) == set(transform.parameters)
    assert all(torch.equal(loaded.parameters[name], tensor) for name, tensor in transform.parameters.items())
    assert {tensor.dtype for tensor in transform.parameters.values()} <= {torch.float64, torch.int64}
    one, other = folded(made, transform), folded(made, loaded)
    assert same_operations(one.online, other.online) and all(
        close(other.state[name], tensor, 1e-13) for name, tensor in one.state.items()
    )


def same_operations(one: dict, other: dict) -> bool:
    """Check whether two decoders have the same online operations, tensors and all."""
    return {key: [operation.keys() for operation in listed] for key, listed in one.items()} == {
        key: [operation.keys() for operation in listed] for key, listed in other.items()
    } and all(
        torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        for key in one
        for ours, theirs in zip(one[key], other[key])
        for name, value in ours.items()
    )


def test_a_failed_fit_passes_its_reason_on(tmp_path):
    """Reads the file that fit_transform writes after a numerical failure."""
    write_tensors(
        tmp_path / "transform.safetensors", {}, {"status": "failed", "reason": "layers.3.down_input holds NaN"}
    )
    with pytest.raises(NumericalFailure, match=r"layers\.3\.down_input holds NaN"):
        load_transform(tmp_path / "transform.safetensors")


@pytest.mark.parametrize("kind", ["R1 hadamard", "R1 orthogonal", "R2", "random hadamard"])
def test_one_seed_one_rotation(kind, given):
    made = given(LLAMA)
    build = {
        "R1 hadamard": lambda seed: [RotateResidual("hadamard", seed)],
        "R1 orthogonal": lambda seed: [RotateResidual("orthogonal", seed)],
        "R2": lambda seed: [RotateHeads(seed)],
        "random hadamard": random_hadamard.primitives,
    }[kind]
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
    assert (
        len(
            {
                derived_seed(0, "R1"),
                derived_seed(0, "R2", 0),
                derived_seed(0, "R2", 1),
                derived_seed(1, "R1"),
                derived_seed(0, "R2", 10),
            }
        )
        == 5
    )
    assert 0 <= derived_seed(0, "R1") < 2**63


def test_parameters_are_small(given, tmp_path):
    """One number per channel at most: what goes to disk is signs and scales, never matrices or
    weights."""
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
    state, inputs = (
        {name: tensor.clone() for name, tensor in made.state.items()},
        {key: x.clone() for key, x in made.inputs.items()},
    )
    if spoil == "weights":
        state["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    else:
        inputs[1, "down_input"][4, 5] = torch.inf
    decoder = DecoderFolder(save(tmp_path, made.config, state, torch.float64))
    with pytest.raises(NumericalFailure, match=r"model.layers.1.mlp.up_proj.weight|layers.1.down_input"):
        fit(scaling.primitives(0.5, NORMS), decoder, write_statistics(tmp_path / "statistics", inputs))


def test_a_name_belongs_to_one_primitive():
    with pytest.raises(
        TypeError, match=r"two primitives are called Scale: quantgrid\.transforms\.primitives\.scale, .*test_transforms"
    ):
        type("Scale", (Primitive,), {"__module__": __name__})
    again = type("Scale", (Primitive,), {"__module__": PRIMITIVES["Scale"].__module__})
    assert PRIMITIVES["Scale"] is not again
