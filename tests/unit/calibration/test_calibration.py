"""Calibration sees what the reference decoder's linears read, keeps the tokens that matter, and
does not depend on how windows are fed."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from build_tiny_model import PLANTING
from quantgrid.calibration.accumulators import BLOCK, Accumulator, sample_positions, site_name
from quantgrid.calibration.collect import collect
from quantgrid.calibration.statistics import LARGEST
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.places import ROOT
from quantgrid.models.plans import SITES
from quantgrid.quantization.checkpoints import load_full_precision
from reference_decoder import site_inputs
from reference_statistics import FIELDS, close, statistics_of
from tiny_decoders import CASES, Case, random_tokens, save

TINY = ROOT / "tests" / "data" / "tiny-llama"
WINDOWS, LENGTH = 6, 12
SEVERAL = [case for case in CASES if case.heads == 9 or case.bias or case.head_dim == 32]
LLAMA, MISTRAL, QWEN2 = (
    next(case for case in CASES if case.architecture.startswith(name)) for name in ("Llama", "Mistral", "Qwen2")
)


def built(case: Case, folder, dtype=torch.float64):
    """(config, state, tokens, model): the model reads the float32 numbers that the state holds."""
    config, state = case.build(torch.float32)
    tokens = random_tokens(config, WINDOWS, LENGTH)
    return config, state, tokens, load_full_precision(save(folder, config, state), dtype)


def rows_within(rows, samples, tolerance=1e-5):
    """Check whether every one of ``rows`` is among ``samples``, both (tokens, n)."""
    distance = torch.cdist(rows.double(), samples.double())
    return bool((distance.amin(1) <= tolerance * rows.double().norm(dim=1)).all())


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_statistics_are_those_of_the_reference_decoder(case, tmp_path):
    config, state, tokens, model = built(case, tmp_path)
    found = collect(model, tokens, samples=16)
    inputs = site_inputs(state, config, tokens)
    assert set(found) == {site_name(layer, site) for layer in range(config["num_hidden_layers"]) for site in SITES}
    for (layer, site), x in inputs.items():
        ours, wanted = found[site_name(layer, site)], statistics_of(x)
        assert ours.count == WINDOWS * LENGTH and not ours.estimated
        for field in FIELDS:
            assert getattr(ours, field).dtype == torch.float64
            assert close(getattr(ours, field), getattr(wanted, field), 1e-5), (layer, site, field)


@pytest.mark.parametrize("case", SEVERAL[:3], ids=str)
def test_the_sample_holds_first_tokens_and_largest_tokens_and_nothing_else(case, tmp_path):
    config, state, tokens, model = built(case, tmp_path)
    found = collect(model, tokens, samples=16)
    for (layer, site), x in site_inputs(state, config, tokens).items():
        samples = found[site_name(layer, site)].samples
        assert samples.shape == (16 + LARGEST, x.shape[1]) and samples.dtype == torch.float32
        assert rows_within(x[: 2 * LENGTH : LENGTH], samples), "the first token of the first 16 // 8 windows"
        assert rows_within(x[x.norm(dim=1).topk(LARGEST).indices], samples), "the tokens of largest norm"
        assert rows_within(samples, x), "tokens of the site"


def test_the_same_tokens_are_sampled_at_every_site(tmp_path):
    config, state, tokens, model = built(LLAMA, tmp_path)
    found = collect(model, tokens, samples=16, seed=3)
    positions = sample_positions(WINDOWS, LENGTH, 16, 3)
    for (layer, site), x in site_inputs(state, config, tokens).items():
        assert close(found[site_name(layer, site)].samples[:16].double(), x[positions], 1e-5)


@pytest.mark.parametrize(
    "windows, window, samples", [(6, 12, 16), (2, 12, 16), (6, 12, 1), (100, 8, 64), (3, 4, 500), (40, 1, 16)]
)
def test_sample_positions(windows, window, samples):
    positions = sample_positions(windows, window, samples, 0)
    first = min(windows, max(1, samples // 8))
    assert torch.equal(positions, positions.unique()) and positions[0] == 0 and positions[-1] < windows * window
    assert (positions % window == 0).sum() == first
    assert len(positions) == min(samples, first + windows * (window - 1))
    assert torch.equal(positions, sample_positions(windows, window, samples, 0))
    if samples == 64:
        assert not torch.equal(positions, sample_positions(windows, window, samples, 1))


@pytest.mark.parametrize("skip", [1, 5, LENGTH - 1])
def test_the_first_tokens_of_every_window_are_context_alone(skip, tmp_path):
    """Oracle: hooked inputs of the model on whole windows, without those tokens."""
    _, _, tokens, model = built(QWEN2, tmp_path)
    found = collect(model, tokens, samples=16, seed=3, skip_first=skip)
    positions, rest = sample_positions(WINDOWS, LENGTH - skip, 16, 3), WINDOWS * (LENGTH - skip)
    for name, x in hooked(tmp_path, tokens).items():
        kept = x[:, skip:].flatten(0, 1)
        assert found[name].count == rest
        assert all(close(getattr(found[name], field), getattr(statistics_of(kept), field), 1e-5) for field in FIELDS), (
            name
        )
        assert close(found[name].samples[: len(positions)].double(), kept[positions], 1e-5)
        assert rows_within(found[name].samples, kept) and not rows_within(x[:, 0], found[name].samples)


def test_all_tokens_left_out_are_refused(tmp_path):
    *_, tokens, model = built(LLAMA, tmp_path)
    with pytest.raises(ConfigError, match=f"skip_first {LENGTH} leaves no tokens of windows of {LENGTH} tokens"):
        collect(model, tokens, skip_first=LENGTH)


def hooked(folder, tokens):
    """Site -> inputs (windows, window, n) in a forward pass of transformers' model, in float64."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager"), {}
    for index, layer in enumerate(model.model.layers):
        for site, module in zip(
            SITES, (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        ):
            module.register_forward_pre_hook(
                lambda _module, inputs, key=(index, site): seen.update({site_name(*key): inputs[0]})
            )
    with torch.no_grad():
        model(tokens)
    return seen


def same(one, other, tolerance=0.0):
    return all(
        close(getattr(one[name], field), getattr(other[name], field), tolerance) for name in one for field in FIELDS
    )


def test_two_calls_agree_and_the_seed_moves_the_sample_alone(tmp_path):
    _, _, tokens, model = built(LLAMA, tmp_path)
    one, again, other = (collect(model, tokens, samples=16, seed=seed) for seed in (0, 0, 1))
    assert same(one, again) and same(one, other)
    assert all(
        torch.equal(one[name].samples, again[name].samples) and not torch.equal(one[name].samples, other[name].samples)
        for name in one
    )


def test_the_order_of_windows_does_not_matter(tmp_path):
    _, _, tokens, model = built(QWEN2, tmp_path)
    assert same(collect(model, tokens), collect(model, tokens.flip(0)), 1e-6)
    assert not same(collect(model, tokens), collect(model, tokens.flip(1)), 1e-2)


def test_windows_do_not_see_one_another(tmp_path):
    _, _, tokens, model = built(LLAMA, tmp_path)
    whole, parts = collect(model, tokens), [collect(model, tokens[:2]), collect(model, tokens[2:])]
    for name, statistics in whole.items():
        few, many = (part[name] for part in parts)
        assert (few.count, many.count, statistics.count) == (2 * LENGTH, 4 * LENGTH, 6 * LENGTH)
        for field in ("mean", "second_moment", "mean_absolute"):
            assert close((getattr(few, field) + 2 * getattr(many, field)) / 3, getattr(statistics, field), 1e-6)
        assert close(torch.minimum(few.minimum, many.minimum), statistics.minimum, 1e-6)
        assert close(torch.maximum(few.maximum, many.maximum), statistics.maximum, 1e-6)


@pytest.mark.parametrize(
    "sizes", [[1] * 90, [90], [7, 50, 33], [40, 0, 50]], ids=["one by one", "at once", "unequal", "empty"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_add_up(sizes, dtype):
    x = torch.randn(90, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.tensor([0, 3, 40, 88])
    accumulator = Accumulator(positions)
    for piece in x.split(sizes):
        if len(piece):
            accumulator.add(piece.unflatten(0, (1, -1)))
    found, wanted = accumulator.result(), statistics_of(x)
    assert found.count == 90
    assert all(close(getattr(found, field), getattr(wanted, field), 1e-6) for field in FIELDS)
    assert torch.equal(found.drawn, x[positions].float())
    assert torch.equal(found.samples[4:], x.float()[x.float().norm(dim=1).topk(LARGEST).indices])


def test_fewer_tokens_than_are_kept():
    x = torch.randn(5, 4)
    accumulator = Accumulator(torch.tensor([0, 2]))
    accumulator.add(x[:3])
    accumulator.add(x[3:])
    assert torch.equal(accumulator.result().drawn, x[[0, 2]]) and accumulator.result().samples.shape == (2 + 5, 4)


def test_sums_do_not_drift():
    """Ten thousand equal tokens: their mean and mean product are known, and no error grows with
    their number."""
    token = torch.randn(8, generator=torch.Generator().manual_seed(1))
    once, often = Accumulator(torch.tensor([0])), Accumulator(torch.tensor([0]))
    once.add(token.expand(100, 8))
    for _ in range(100):
        often.add(token.expand(100, 8))
    few, many, again = once.result(), often.result(), often.result()
    assert close(many.mean, token.double(), 2e-7) and close(
        many.second_moment, token.double().outer(token.double()), 1e-5
    )
    assert close(many.mean, few.mean, 1e-14) and close(many.second_moment, few.second_moment, 1e-14)
    assert torch.equal(again.second_moment, many.second_moment)


@pytest.mark.parametrize("channels", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_second_moments_are_whole_and_symmetric(channels):
    """Half of a second moment is computed, block by block: the other half is the same to the bit,
    and all of it that of the plain product."""
    x = torch.randn(40, channels, generator=torch.Generator().manual_seed(2))
    accumulator = Accumulator(torch.tensor([0]))
    for piece in x.split(16):
        accumulator.add(piece)
    found = accumulator.result().second_moment
    assert torch.equal(found, found.mT)
    assert close(found, x.double().mT @ x.double() / 40, 1e-6)


SLIDING = {
    "mistral": (MISTRAL, {"sliding_window": 4}),
    "qwen2, one layer of two": (
        QWEN2,
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("case, change", SLIDING.values(), ids=SLIDING)
def test_sliding_windows_are_those_of_the_model(case, change, tmp_path):
    """The oracle is the model's own forward pass, hooked at every site; full attention gives
    something else."""
    config, state = case.build(torch.float32)
    tokens = random_tokens(config, WINDOWS, LENGTH)
    folder = save(tmp_path, {**config, **change}, state)
    found = collect(load_full_precision(folder, torch.float64), tokens)
    seen = {name: x.flatten(0, 1) for name, x in hooked(folder, tokens).items()}
    full = {site_name(*key): statistics_of(x) for key, x in site_inputs(state, config, tokens).items()}
    assert same(found, {name: statistics_of(x) for name, x in seen.items()}, 1e-5)
    assert not same(found, full, 1e-3)
    if case is QWEN2:
        first = {name: statistics for name, statistics in found.items() if name.startswith("layers.0")}
        assert same(first, full, 1e-5)


def test_planted_outliers_are_seen():
    model = load_full_precision(TINY)
    tokens = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    found = collect(model, tokens)
    shape = model.config
    channels = {
        "attention_input": PLANTING.hidden,
        "mlp_input": PLANTING.hidden,
        "down_input": PLANTING.down,
        "output_input": {
            head * shape.head_dim + channel for head in range(shape.num_attention_heads) for channel in PLANTING.value
        },
    }
    for layer in range(shape.num_hidden_layers):
        for site, planted in channels.items():
            size = found[site_name(layer, site)].second_moment.diagonal().sqrt()
            others = torch.ones_like(size, dtype=torch.bool)
            others[list(planted)] = False
            assert size[list(planted)].mean() > 5 * size[others].mean(), (layer, site)


def test_the_model_is_left_as_it_was(tmp_path):
    _, _, tokens, model = built(LLAMA, tmp_path)
    before, seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    collect(model, tokens, progress=lambda layers: seen.append(len(layers)) or layers)
    assert seen == [model.config.num_hidden_layers]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_broken_model_shows_in_its_statistics(tmp_path):
    _, _, tokens, model = built(LLAMA, tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = math.nan
    found = collect(model, tokens)
    found[site_name(0, "mlp_input")].require_finite("layers.0.mlp_input")
    with pytest.raises(NumericalFailure, match="layers.0.down_input"):
        found[site_name(0, "down_input")].require_finite("layers.0.down_input")


def test_a_bfloat16_model_is_summed_in_float64(tmp_path):
    config, state, tokens, model = built(LLAMA, tmp_path, torch.bfloat16)
    found = collect(model, tokens)
    for (layer, site), x in site_inputs(state, config, tokens).items():
        statistics = found[site_name(layer, site)]
        assert statistics.second_moment.dtype == torch.float64 and close(
            statistics.second_moment, statistics_of(x).second_moment, 0.1
        )
