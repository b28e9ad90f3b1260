"""Statistics under a transform in closed form are those of the transformed tokens, and say where
they are estimates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgrid.calibration.statistics import from_file, stack, to_tensors
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.storage import open_tensors, write_tensors
from quantgrid.linalg.hadamard import apply_hadamard
from reference_statistics import FIELDS, close, statistics_of

N, TOKENS = 24, 300


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed=0):
    """(TOKENS, N) correlated channels of unequal size and non-zero mean."""
    return (normal(TOKENS, N, seed=seed) @ normal(N, N, seed=seed + 1) + 3 * normal(N, seed=seed + 2)) * normal(
        N, seed=seed + 3
    ).exp()


def kronecker(x):
    """x (P1 (x) P2) with P1 of order 4 and P2 of order 6."""
    return (normal(4, 4, seed=8).T @ x.unflatten(-1, (4, 6)) @ normal(6, 6, seed=9)).flatten(-2)


DIAGONAL, SQUARE, WIDE = normal(N, seed=5), normal(N, N, seed=6), normal(N, 2 * N, seed=7)
MAPS = {
    "vector": (DIAGONAL, lambda x: x * DIAGONAL),
    "matrix": (SQUARE, lambda x: x @ SQUARE),
    "rectangular": (WIDE, lambda x: x @ WIDE),
    "hadamard": (apply_hadamard, apply_hadamard),
    "kronecker": (kronecker, kronecker),
}
SHIFTS = {"no shift": None, "shift": normal(N, seed=10), "mean": tokens().mean(0)}


@pytest.mark.parametrize("z", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("T, rows", MAPS.values(), ids=MAPS)
def test_closed_form_is_collected_again(T, rows, z):
    x = tokens()
    wanted = statistics_of(rows(x if z is None else x - z))
    found = statistics_of(x).transformed(T, z)
    assert found.count == TOKENS
    for field in ("second_moment", "mean_absolute", "minimum", "maximum", "samples"):
        assert close(getattr(found, field), getattr(wanted, field)), field
    # the mean itself may be zero
    assert close(found.mean + wanted.mean_absolute, wanted.mean + wanted.mean_absolute)
    assert close(found.maximum_absolute, rows(x if z is None else x - z).abs().amax(0))


def test_centred_second_moment_is_the_covariance():
    x = tokens()
    assert close(statistics_of(x).transformed(torch.ones(N), x.mean(0)).second_moment, torch.cov(x.T, correction=0))


def test_zero_shift_and_unit_scale_change_no_number():
    before = statistics_of(tokens())
    after = before.transformed(torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64))
    assert all(torch.equal(getattr(before, field), getattr(after, field)) for field in FIELDS)


@pytest.mark.parametrize(
    "T", [DIAGONAL, -DIAGONAL.abs(), 0 * DIAGONAL, DIAGONAL.float()], ids=["mixed", "negative", "zero", "float32"]
)
def test_scaling_keeps_extremes_exact_whatever_the_sample(T):
    x = tokens()
    found = statistics_of(x, samples=x[:5].float()).transformed(T)
    wanted = statistics_of(x * T)
    assert not found.estimated and found.samples.dtype == torch.float32
    assert torch.equal(found.minimum, wanted.minimum) and torch.equal(found.maximum, wanted.maximum)
    assert close(found.mean_absolute, wanted.mean_absolute)


def test_shifting_keeps_extremes_exact_and_estimates_mean_absolutes():
    x, z = tokens(), SHIFTS["shift"]
    found = statistics_of(x, samples=x[:50]).transformed(torch.ones(N), z)
    assert found.estimated
    assert torch.equal(found.minimum, (x - z).amin(0)) and torch.equal(found.maximum, (x - z).amax(0))
    assert close(found.mean_absolute, (x[:50] - z).abs().mean(0))


@pytest.mark.parametrize(
    "T, rows", [MAPS["matrix"], MAPS["rectangular"], MAPS["hadamard"]], ids=["matrix", "rectangular", "hadamard"]
)
def test_mixing_estimates_extremes_from_the_sample(T, rows):
    x = tokens()
    found = statistics_of(x, samples=x[::7]).transformed(T)
    inside, everything = statistics_of(rows(x[::7])), statistics_of(rows(x))
    assert found.estimated
    assert all(
        close(getattr(found, field), getattr(inside, field)) for field in ("mean_absolute", "minimum", "maximum")
    )
    assert all(close(getattr(found, field), getattr(everything, field)) for field in ("mean", "second_moment"))
    assert not close(found.maximum, everything.maximum)


@pytest.mark.parametrize("T", [DIAGONAL, SQUARE], ids=["scaling", "mixing"])
def test_an_estimate_stays_one(T):
    before = statistics_of(tokens())
    assert not before.estimated
    assert before.transformed(SQUARE).transformed(T).estimated
    assert before.transformed(DIAGONAL, SHIFTS["shift"]).transformed(T).estimated


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_two_transforms_are_their_product(seed, n, count, diagonal):
    x = normal(count, n, seed=seed)
    first, z = (normal(n, seed=seed + 1) if diagonal else normal(n, n, seed=seed + 1)), normal(n, seed=seed + 2)
    second, y = normal(n, n, seed=seed + 3), normal(n, seed=seed + 4)
    matrix = torch.diag(first) if diagonal else first
    both = statistics_of(x).transformed(first, z).transformed(second, y)
    wanted = statistics_of(((x - z) @ matrix - y) @ second)
    assert close(both.mean, wanted.mean, 1e-8)
    assert close(both.second_moment, wanted.second_moment, 1e-8)
    assert close(both.second_moment, both.second_moment.T, 1e-12)


def test_the_largest_magnitudes_before_scaling_outlast_it():
    x, order = tokens(), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    before, z = statistics_of(x), SHIFTS["shift"]
    assert torch.equal(before.unscaled_maximum, before.maximum_absolute)
    scaled = before.transformed(DIAGONAL)
    flat = scaled.transformed(1 / scaled.maximum_absolute)
    assert close(flat.maximum_absolute, torch.ones(N).double()) and close(flat.unscaled_maximum, x.abs().amax(0))
    assert close(flat.permuted(order).unscaled_maximum, x.abs().amax(0)[order])
    assert close(scaled.shifted(z * DIAGONAL).unscaled_maximum, (x - z).abs().amax(0))
    several = stack([before, flat]).to("cpu").transformed(DIAGONAL)
    assert all(close(found, x.abs().amax(0)) for found in several.unscaled_maximum)
    silent = before.transformed(torch.where(torch.arange(N) == 3, 0.0, DIAGONAL))
    assert silent.unscaled_maximum[3] == 0 and close(silent.unscaled_maximum[4:], x.abs().amax(0)[4:])


def test_mixed_channels_have_no_magnitudes_before():
    x = tokens()
    mixed = statistics_of(x).transformed(DIAGONAL).transformed(SQUARE)
    wanted = (x * DIAGONAL @ SQUARE).abs().amax(0)
    assert close(mixed.unscaled_maximum, wanted) and close(mixed.transformed(DIAGONAL).unscaled_maximum, wanted)


STACKED = {
    "shared vector": (DIAGONAL, lambda layer: DIAGONAL),
    "vector per layer": (normal(3, N, seed=11), lambda layer: normal(3, N, seed=11)[layer]),
    "shared matrix": (SQUARE, lambda layer: SQUARE),
    "matrix per layer": (normal(3, N, N, seed=12), lambda layer: normal(3, N, N, seed=12)[layer]),
    "function": (apply_hadamard, lambda layer: apply_hadamard),
}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("z", [None, normal(3, N, seed=13)], ids=["no shift", "shift"])
@pytest.mark.parametrize("T, of_layer", STACKED.values(), ids=STACKED)
def test_layers_in_one_call_are_layers_one_by_one(T, of_layer, z, layers):
    if isinstance(T, torch.Tensor) and T.shape[0] == 3:
        T = T[:layers]
    each = [statistics_of(tokens(seed)) for seed in range(layers)]
    together = stack(each)
    assert together.count == TOKENS and together.second_moment.shape == (layers, N, N) and not together.estimated
    together = together.transformed(T, None if z is None else z[:layers])
    for layer, alone in enumerate(each):
        alone = alone.transformed(of_layer(layer), None if z is None else z[layer])
        assert together.estimated == alone.estimated
        assert all(
            close(getattr(together, field)[layer], getattr(alone, field), 1e-12) for field in (*FIELDS, "samples")
        )


def test_a_stack_with_one_estimate_is_an_estimate():
    exact = statistics_of(tokens())
    assert stack([exact, exact.transformed(SQUARE)]).estimated


def test_memory_is_made_once_and_not_inherited():
    statistics, calls = statistics_of(tokens()), []
    for _ in range(3):
        assert statistics.remembered("key", lambda: calls.append(1) or "made") == "made"
    assert len(calls) == 1
    shifted = statistics.transformed(DIAGONAL, SHIFTS["shift"])
    for changed in (statistics.transformed(DIAGONAL), statistics.transformed(SQUARE), shifted, stack([statistics])):
        assert changed.remembered("key", lambda: "anew") == "anew"
    assert statistics.memory == {"key": "made"}


def test_a_file_keeps_them_to_float32(tmp_path):
    written = {
        name: statistics_of(tokens(seed), samples=tokens(seed)[:9].float())
        for seed, name in enumerate(("layers.0.a", "layers.1.a"))
    }
    path = tmp_path / "statistics.safetensors"
    write_tensors(
        path,
        {key: tensor for name, statistics in written.items() for key, tensor in to_tensors(name, statistics).items()},
    )
    with open_tensors(path) as file:
        for name, statistics in written.items():
            found = from_file(file, name)
            assert found.count == TOKENS and not found.estimated and torch.equal(found.samples, statistics.samples)
            for field in FIELDS:
                assert getattr(found, field).dtype == (torch.float32 if field == "second_moment" else torch.float64), (
                    field
                )
                assert torch.equal(
                    getattr(found, field), getattr(statistics, field).float().to(getattr(found, field))
                ), field


def test_a_truncated_file_is_refused_by_name(tmp_path):
    path = tmp_path / "statistics.safetensors"
    write_tensors(path, to_tensors("site", statistics_of(tokens())))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="statistics.safetensors"), open_tensors(path) as file:
        from_file(file, "site")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_failure_of_the_cell(value):
    statistics_of(tokens()).require_finite("layers.1.down_input")
    spoilt = tokens()
    spoilt[17, 3] = value
    with pytest.raises(NumericalFailure, match=r"layers\.1\.down_input.*NaN or infinity"):
        statistics_of(spoilt).require_finite("layers.1.down_input")


@pytest.mark.parametrize("field", ["mean", "second_moment", "minimum", "maximum"])
def test_the_failure_names_what_is_not_finite(field):
    spoilt = statistics_of(tokens())
    getattr(spoilt, field)[..., 3] = math.nan
    with pytest.raises(NumericalFailure, match=rf"\({field}\)"):
        spoilt.require_finite("site")
