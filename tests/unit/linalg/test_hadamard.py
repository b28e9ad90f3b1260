"""Hadamard orders, matrices and the fast product."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT
from quantgrid.linalg.hadamard import apply_hadamard, hadamard_matrix, random_hadamard, random_orthogonal, random_signs
from quantgrid.linalg.hadamard_orders import (
    construction,
    hadamard_factors,
    is_reachable,
    prime_power,
    quadratic_character,
)

# n -> (k, power): the widths of widespread models.
TABLE = {
    576: (36, 4),
    1152: (36, 5),
    1536: (12, 7),
    3072: (12, 8),
    24: (12, 1),
    5120: (20, 8),
    2560: (20, 7),
    40: (20, 1),
    13824: (108, 7),
    27648: (108, 8),
    2048: (1, 11),
    4096: (1, 12),
    8192: (1, 13),
    64: (1, 6),
    128: (1, 7),
    14336: (28, 9),
    28672: (28, 10),
    896: (28, 5),
    3584: (28, 7),
    18944: (148, 7),
    4864: (76, 6),
    9728: (76, 7),
    8960: (140, 6),
    29568: (924, 5),
    11008: (172, 6),
    1: (1, 0),
    2: (1, 1),
}
CORES = {
    1: ("trivial", 1),
    12: ("paley_1", 11),
    20: ("paley_1", 19),
    28: ("paley_2", 13),
    36: ("paley_2", 17),
    76: ("paley_2", 37),
    108: ("paley_1", 107),
    140: ("paley_1", 139),
    148: ("paley_2", 73),
    172: ("williamson", 43),
    924: ("paley_2", 461),
}
PRIME_POWER_CORES = {52: ("paley_2", 25), 100: ("paley_2", 49), 244: ("paley_1", 243), 344: ("paley_1", 343)}


def assert_hadamard(matrix):
    n = len(matrix)
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=matrix.dtype))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=matrix.dtype))


def dense(x):
    n = x.shape[-1]
    return x.double() @ hadamard_matrix(n) / n**0.5


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", TABLE)
def test_factors_of_the_tabulated_orders(n):
    assert hadamard_factors(n) == TABLE[n] and is_reachable(n)


@pytest.mark.parametrize("k, built", (CORES | PRIME_POWER_CORES).items())
def test_cores_are_hadamard_and_built_as_stated(k, built):
    assert construction(k) == built
    assert_hadamard(hadamard_matrix(k))


@pytest.mark.parametrize("n", [n for n in TABLE if n <= 1536])
def test_tabulated_matrices_are_hadamard(n):
    assert_hadamard(hadamard_matrix(n))


@pytest.mark.parametrize("n", [n for n in TABLE if n > 1536])
def test_large_orders_preserve_length_and_are_flat(n):
    """H H^T = n I without the n x n product: a unit vector becomes +-1 / sqrt(n), inner products
    stay."""
    x = gaussian(3, n)
    y = apply_hadamard(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-10)
    unit = torch.zeros(n, dtype=torch.float64)
    unit[n // 3] = 1
    torch.testing.assert_close(
        apply_hadamard(unit).abs(), torch.full((n,), n**-0.5, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_every_reachable_order_to_400_is_hadamard():
    for n in range(1, 401):
        if is_reachable(n):
            assert_hadamard(hadamard_matrix(n))


def test_smallest_order_out_of_reach_is_92():
    assert [n for n in range(4, 150, 4) if not is_reachable(n)] == [92, 116]
    assert not any(is_reachable(n) for n in (-4, 0, 3, 9, 18, 30))


@pytest.mark.parametrize("n, nearest", [(9, "8 and 12"), (92, "88 and 96"), (23, "20 and 24"), (116, "112 and 120")])
def test_unreachable_order_names_the_neighbours_and_what_would_do(n, nearest):
    for call in (
        hadamard_factors,
        hadamard_matrix,
        lambda n: apply_hadamard(torch.ones(2, n)),
        lambda n: random_hadamard(n, 0),
    ):
        with pytest.raises(ConfigError, match=f"order {n}:.* are {nearest}.*andom orthogonal"):
            call(n)


def test_unreachable_order_offers_the_largest_blocks():
    with pytest.raises(ConfigError, match="block Hadamard of 23 blocks of 8 fits 184 channels"):
        hadamard_factors(184)


@pytest.mark.parametrize("n", [0, -4])
def test_no_order_below_one(n):
    for call in (hadamard_factors, lambda n: random_orthogonal(n, 0)):
        with pytest.raises(ConfigError, match="positive"):
            call(n)


@pytest.mark.parametrize("q", [3, 5, 9, 13, 25, 27, 49, 343])
def test_quadratic_character_of_a_field(q):
    character = quadratic_character(q)
    assert character[0] == 0 and sum(character) == 0 and character.count(1) == (q - 1) // 2
    p, m = prime_power(q)
    assert p**m == q
    if m == 1:
        assert {a * a % q for a in range(1, q)} == {a for a in range(q) if character[a] == 1}


def test_orders_import_no_torch():
    program = (
        "import sys; import quantgrid.linalg.hadamard_orders as h; assert h.is_reachable(576); assert 'torch' "
        "not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(ROOT / "scripts")})


@pytest.mark.parametrize("k", [1, 12, 20, 28, 36, 76, 108, 140, 148, 172])
@pytest.mark.parametrize("power", [0, 1, 3, 4, 5])
def test_fast_equals_dense(k, power):
    n = k << power
    x = gaussian(3, n)
    torch.testing.assert_close(apply_hadamard(x), dense(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [512, 1536, 2048])
def test_fast_equals_dense_at_model_widths(n):
    x = gaussian(5, n)
    torch.testing.assert_close(apply_hadamard(x), dense(x), rtol=0, atol=1e-12)


def test_the_transpose_is_another_map():
    """Negative control: a core of Paley I or Williamson is not symmetric, so a mix-up of H and H^T
    must show."""
    for n in (12, 20, 172, 1536):
        x, matrix = gaussian(2, n), hadamard_matrix(n)
        assert (apply_hadamard(x) - x @ matrix.T / n**0.5).abs().max() > 0.1


@pytest.mark.parametrize("n", [12, 64, 576, 1536])
def test_linear_layer_is_preserved(n):
    x, weight = gaussian(4, n), gaussian(6, n, seed=1)
    torch.testing.assert_close(apply_hadamard(x) @ apply_hadamard(weight).T, x @ weight.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_types_and_shapes(dtype, tolerance):
    x = gaussian(2, 3, 5, 576, dtype=dtype)
    for view in (x, x[:, ::2], x.transpose(0, 2), x[0, 0, 0], x[:, :0], gaussian(576, 7, dtype=dtype).T):
        y = apply_hadamard(view)
        assert y.dtype == dtype and y.shape == view.shape
        torch.testing.assert_close(y.double(), dense(view), rtol=tolerance, atol=tolerance)


def test_float16_outlier_does_not_overflow():
    x = torch.zeros(1, 1536, dtype=torch.float16)
    x[0, :200] = 3000
    assert apply_hadamard(x).isfinite().all()


def test_integers_are_refused():
    with pytest.raises(ConfigError, match="floating-point"):
        apply_hadamard(torch.ones(2, 64, dtype=torch.long))


@pytest.mark.parametrize("n", [24, 576])
def test_differentiable(n):
    x = gaussian(2, n).requires_grad_()
    assert torch.autograd.gradcheck(apply_hadamard, x, fast_mode=True)
    upstream = gaussian(2, n, seed=1)
    (gradient,) = torch.autograd.grad(apply_hadamard(x), x, upstream)
    torch.testing.assert_close(gradient, upstream @ hadamard_matrix(n).T / n**0.5, rtol=0, atol=1e-12)


def test_usable_by_autograd_after_inference_mode():
    with torch.inference_mode():
        apply_hadamard(torch.ones(1, 832))
    x = torch.ones(1, 832, requires_grad=True)
    apply_hadamard(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [12, 576])
def test_caches_do_not_alias(n):
    x = gaussian(2, n)
    expected = apply_hadamard(x)
    hadamard_matrix(n).zero_()
    hadamard_matrix(n, torch.float32).zero_()
    apply_hadamard(x).zero_()
    random_hadamard(n, 0).zero_()
    assert torch.equal(apply_hadamard(x), expected)
    torch.testing.assert_close(apply_hadamard(x.float()), expected.float(), rtol=0, atol=1e-5)
    assert_hadamard(hadamard_matrix(n))


def kurtosis(x):
    centred = x - x.mean(-1, keepdim=True)
    return (centred**4).mean(-1) / centred.square().mean(-1) ** 2


@pytest.mark.parametrize("n", [576, 1536])
def test_kurtosis_of_an_outlier_drops(n):
    x = gaussian(8, n)
    x[:, 5] += 100
    rotated = apply_hadamard(x * random_signs(n, 0))
    assert kurtosis(x).min() > 100 and kurtosis(rotated).max() < 5


@pytest.mark.parametrize("n", [12, 36, 576])
def test_random_hadamard_is_signs_before_mixing(n):
    matrix, signs, x = random_hadamard(n, 3), random_signs(n, 3), gaussian(4, n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(x @ matrix, apply_hadamard(x * signs), rtol=0, atol=1e-12)
    assert not torch.equal(matrix, random_hadamard(n, 4)) and set(signs.tolist()) == {-1.0, 1.0}


def test_random_matrices_follow_their_seed_and_leave_the_global_one():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for make in (random_orthogonal, random_hadamard, random_signs):
        assert torch.equal(make(20, 1), make(20, 1)) and not torch.equal(make(20, 1), make(20, 2))
        assert make(20, 1, torch.float32).dtype == torch.float32
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("n", [1, 9, 144])
def test_random_orthogonal_is_orthogonal(n):
    matrix = random_orthogonal(n, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_random_orthogonal_is_haar():
    """The trace of a Haar matrix has mean 0 and variance 1; plain Householder QR has a trace far
    below 0."""
    traces = torch.stack([random_orthogonal(6, seed).trace() for seed in range(2000)])
    assert abs(traces.mean()) < 0.1 and abs(traces.var() - 1) < 0.15
