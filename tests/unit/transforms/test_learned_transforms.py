"""Learned transforms as transforms: whatever their parameters, they preserve the function; how
clipping and online products reach a cell."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from learned_cases import EXPERTS, LEARNED, SPARSE, Given, recipe, schemes, shaken, start
from quantgrid.calibration.layers import DecoderLayer
from quantgrid.config.cell_checks import check_cell
from quantgrid.config.grid import study_cells
from quantgrid.evaluation.gates import check_transform
from quantgrid.ground.errors import ConfigError
from quantgrid.inference.online import arithmetic
from quantgrid.inference.transform import Transform, fit
from quantgrid.linalg.kronecker import apply_kronecker
from quantgrid.linalg.kronecker_sizes import kronecker_sizes
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import END_ROLES, LINEARS, SITES
from quantgrid.models.shapes import layer_tensors
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import load_quantized, save_quantized
from quantgrid.quantizer import fake_quantize
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.files import load_transform
from quantgrid.transforms.primitives.affine import Affine, factor_sizes, matrices
from quantgrid.transforms.primitives.learned_clip import LearnedClip, LearnedInputClip, clamp_weight
from quantgrid.transforms.recipes import random_hadamard
from reference_decoder import site_inputs
from reference_statistics import close, run, statistics_of
from selection import others_slow
from tiny_decoders import VARIED


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return cache(lambda case: Given.make(tmp_path_factory.mktemp("case"), case))


def folded(made: Given, transform: Transform, exact: bool = False) -> tuple[dict, dict, list[DecoderLayer]]:
    """(state, online operations by (layer, site), layers) of the transformed decoder; with
    ``exact`` statistics of all tokens."""
    state, online, layers = {}, {}, []
    inputs = site_inputs(made.state, made.config, made.tokens) if exact else {}
    for index in range(made.decoder.shape.layers):
        layer = made.decoder.layer(index)
        layer.statistics = {site: statistics_of(inputs[index, site]) for site in SITES if exact}
        transform.fold_layer(layer)
        names = layer_tensors(made.decoder.shape, index)
        state |= {names[role]: tensor for role, tensor in layer.weights.items()}
        online |= {(index, site): operations for site, operations in layer.online.items()}
        layers.append(layer)
    ends = made.decoder.ends()
    transform.fold_ends(ends)
    return state | {END_ROLES[role]: tensor for role, tensor in ends.items()}, online, layers


@pytest.mark.parametrize("parameters", ["start", "learned"])
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("case", VARIED, ids=str)
def test_the_function_is_preserved(case, name, parameters, given):
    made = given(case)
    transform = start(made, name)
    state, online, _ = folded(made, shaken(transform) if parameters == "learned" else transform)
    assert close(run(state, made.config, made.tokens[:2], online)[0], made.logits, 1e-9)
    assert any(not torch.equal(tensor, state[role]) for role, tensor in made.state.items())


@pytest.mark.parametrize(
    "case, name",
    others_slow(
        [(case, name) for case in EXPERTS for name in LEARNED],
        lambda case, name: case == SPARSE and name in ("flatquant", "optimized_rotation_scaling"),
    ),
)
def test_the_function_of_experts_is_preserved(case, name, given):
    made = given(case)
    transform = shaken(start(made, name))
    assert any(".down_input.3" in parameter or ".down.3" in parameter for parameter in transform.parameters) == (
        name in ("flatquant", "optimized_rotation_scaling", "optimized_scaling")
    )
    check_transform("tiny", name, made.decoder, transform, made.tokens[:2])


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("case", VARIED[:2], ids=str)
def test_statistics_are_those_of_the_transformed_model(case, name, given):
    made = given(case)
    state, online, layers = folded(made, shaken(start(made, name)), exact=True)
    for (index, site), x in run(state, made.config, made.tokens, online)[1].items():
        ours, wanted = layers[index].statistics[site], statistics_of(x)
        assert all(
            close(getattr(ours, part), getattr(wanted, part), 1e-9)
            for part in ("second_moment", "minimum", "maximum", "samples")
        )


@pytest.mark.parametrize("name", ["optimized_rotation", "optimized_rotation_scaling", "data_free_rotation"])
def test_the_start_is_random_hadamard_to_the_last_bit(name, given):
    made = given(VARIED[1])
    options = {"basis": "none"} if name == "optimized_rotation_scaling" else {}
    ours, fixed = (
        folded(made, start(made, name, seed=5, **options)),
        folded(made, fit(random_hadamard.primitives(5), made.decoder, None)),
    )
    assert ours[1] == fixed[1] and set(ours[0]) == set(fixed[0])
    assert all(torch.equal(ours[0][tensor], fixed[0][tensor]) for tensor in fixed[0])


@pytest.mark.parametrize("name", LEARNED)
def test_a_saved_transform_folds_the_same(name, given, tmp_path):
    made = given(VARIED[1])
    transform = shaken(start(made, name))
    transform.save(tmp_path / "transform.safetensors", {"status": "ok"})
    loaded = load_transform(tmp_path / "transform.safetensors")
    assert loaded.primitives == transform.primitives
    one, other = folded(made, transform), folded(made, loaded)
    assert all(torch.equal(other[0][role], tensor) for role, tensor in one[0].items())


# -- Kronecker products ----------------------------------------------------------------------------


def test_sizes_by_the_rule_of_flatquant():
    published = {
        576: (24, 24),
        896: (28, 32),
        1536: (32, 48),
        2048: (32, 64),
        3072: (48, 64),
        3584: (56, 64),
        4864: (64, 76),
        8192: (64, 128),
        8960: (80, 112),
        11008: (86, 128),
        14336: (112, 128),
        18944: (128, 148),
        28672: (128, 224),
        7: (1, 7),
        1: (1, 1),
    }
    assert {n: kronecker_sizes(n) for n in published} == published
    for n in (2, 6, 10, 1534):
        with pytest.raises(ConfigError, match="2 mod 4"):
            kronecker_sizes(n)


def test_a_model_that_does_not_split_is_refused_by_name():
    shape = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "intermediate_size": 98,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocabulary": 100,
    }
    config = {
        "models": {"odd": {"source": "hub", "id": "x", "revision": "main", "shape": shape}},
        "transforms": {},
        "mitigations": {},
        "formats": {},
        "studies": {
            "s": {
                "models": ["odd"],
                "transforms": ["flatquant"],
                "mitigations": ["rtn"],
                "granularities": ["channel"],
                "formats": ["int4"],
            }
        },
    }
    with pytest.raises(
        ConfigError, match=r"'flatquant' splits intermediate_size of model 'odd'.*98 = 2 mod 4.*optimized_scaling"
    ):
        study_cells(config, "s")
    shape["intermediate_size"] = 96
    check_cell(config, study_cells(config, "s")[1], "studies.s")


def test_a_kronecker_product_is_the_dense_one():
    x, left, right = (
        torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for size in ((3, 5, 24), (4, 4), (6, 6))
    )
    assert close(apply_kronecker(x, left, right), x @ torch.kron(left, right), 1e-12)
    assert close(apply_kronecker(x, left), x @ torch.kron(left, torch.eye(6, dtype=torch.float64)), 1e-12)
    assert arithmetic({"operation": "kronecker", "left": left, "right": right}, 24) == 24 * 2 * 10


def test_p_times_its_inverse_is_the_identity(given):
    made = given(VARIED[0])
    transform = shaken(start(made, "flatquant"))
    layer = made.decoder.layer(0)
    number = next(number for number, primitive in enumerate(transform.primitives) if isinstance(primitive, Affine))
    parameters = {
        name.removeprefix(f"{number}.0."): value
        for name, value in transform.parameters.items()
        if name.startswith(f"{number}.0.")
    }
    for site in SITES:
        for side, size in zip(("left", "right"), factor_sizes(layer.shape, site)):
            p, inverse = matrices(parameters, f"{site}.{side}")
            assert p.shape == (size, size) and close(p @ inverse.mT, torch.eye(size, dtype=torch.float64), 1e-12)
            assert not close(p @ p.mT, torch.eye(size, dtype=torch.float64), 1e-2)


def test_online_products_reach_the_checkpoint(given, tmp_path):
    """Weights in bfloat16 and nothing else rounded: the loaded model differs from the original as
    far as bfloat16 does."""
    made = given(VARIED[1])
    content = quantize_decoder(
        made.decoder, Recipe(shaken(start(made, "flatquant")), CellSchemes(), None, None)
    ).content
    save_quantized(content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {})
    found = load_quantized(tmp_path)(made.tokens[:2]).logits
    error = (found - made.logits).norm() / made.logits.norm()
    assert 1e-5 < error < 0.03


# -- clipping --------------------------------------------------------------------------------------


def test_clipping_limits_each_block():
    w = torch.tensor([[4.0, -1.0, 2.0, -8.0], [1.0, 1.0, 0.5, 3.0]])
    half, full = torch.full((2, 1), 0.5), torch.ones(2, 1)
    assert torch.equal(clamp_weight(w, half, full, symmetric=False), torch.tensor([[4.0, -1, 2, -4], [1, 1, 0.5, 3]]))
    assert torch.equal(clamp_weight(w, full, half, symmetric=False), torch.tensor([[2.0, -1, 2, -8], [1, 1, 0.5, 1.5]]))
    assert torch.equal(clamp_weight(w, half, half, symmetric=True), torch.tensor([[4.0, -1, 2, -4], [1, 1, 0.5, 1.5]]))
    assert torch.equal(
        clamp_weight(w, half.expand(2, 2), half.expand(2, 2), symmetric=True),
        torch.tensor([[2.0, -1, 2, -4], [0.5, 0.5, 0.5, 1.5]]),
    )
    assert torch.equal(clamp_weight(w, full, full, symmetric=True), w)


@pytest.mark.parametrize("granularity", ["channel", "group-16"])
def test_a_cell_rounds_the_clipped_weight(granularity, given, tmp_path):
    made, wanted = given(VARIED[1]), schemes("int4_sym", granularity)
    transform = shaken(
        Transform([LearnedClip.of(wanted.weight)[0]], fit(LearnedClip.of(wanted.weight), made.decoder, None).parameters)
    )
    layer = made.decoder.layer(0)
    plain = {linear: weight.clone() for linear, weight in layer.weights.items()}
    transform.fold_layer(layer)
    assert all(torch.equal(layer.weights[linear], plain[linear]) for linear in plain)
    done = quantize_decoder(
        made.decoder, Recipe(transform, CellSchemes(weight=wanted.weight), rtn, made.folder / "statistics")
    )
    save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {})
    used = load_quantized(tmp_path).model.layers[0].self_attn.q_proj.weight
    low, high = (transform.parameters[f"0.0.q.{end}"].float() for end in ("low", "high"))
    clipped = clamp_weight(plain["q"].float(), low, high, symmetric=True)
    assert torch.equal(used, fake_quantize(clipped, wanted.weight)) and not torch.equal(
        used, fake_quantize(plain["q"].float(), wanted.weight)
    )
    error = ((used - plain["q"]).square().sum() / plain["q"].square().sum()).item()
    assert done.errors["0.q"]["weight_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("preset, granularity", [("int4", "channel"), ("int4", "group-16"), ("nvfp4", "group-16")])
def test_a_checkpoint_rounds_the_clipped_input(preset, granularity, given, tmp_path):
    """FlatQuant's clipping of activations: the loaded model clamps what its sites round, in blocks
    of the scheme."""
    made, wanted = given(VARIED[1]), schemes(preset, granularity)
    clips = LearnedInputClip.of(wanted)
    transform = shaken(Transform(clips, fit(clips, made.decoder, None).parameters))
    done = quantize_decoder(made.decoder, Recipe(transform, wanted, rtn, made.folder / "statistics"))
    save_quantized(done.content, tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {})
    site_input = load_quantized(tmp_path).model.layers[1].mlp.down_proj.site_input
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    low, high = (transform.parameters[f"0.1.down_input.{end}"].float() for end in ("clip_low", "clip_high"))
    found = wanted.activation["down_input"][0]
    blocks = x.unflatten(-1, (-1, found.group_size or 128))
    least, most = low * blocks.amin(-1, keepdim=True).clamp(max=0), high * blocks.amax(-1, keepdim=True).clamp(min=0)
    if found.symmetric:
        most = torch.maximum(-least, most)
        least = -most
    clipped = torch.minimum(torch.maximum(blocks, least), most).flatten(-2)
    assert torch.equal(site_input(x)[0], fake_quantize(clipped, found)) and not torch.equal(
        site_input(x.clone())[0], fake_quantize(x, found)
    )
    assert LearnedInputClip.of(CellSchemes()) == [] == LearnedInputClip.of(schemes("int8", "tensor"))


def test_clip_ratios_follow_the_blocks_of_the_scheme(given):
    made = given(VARIED[1])
    for found, blocks in ((scheme("int4"), 1), (scheme("int4", granularity="group-16"), 4)):
        parameters = fit(LearnedClip.of(found), made.decoder, None).parameters
        assert parameters["0.0.q.low"].shape == (64, blocks) and len(parameters) == 2 * 2 * len(LINEARS)
    assert LearnedClip.of(None) == []
    assert not any(
        isinstance(primitive, LearnedClip)
        for primitive in recipe("flatquant")[0].primitives(CellSchemes(), 0, 0.3, True)
    )
