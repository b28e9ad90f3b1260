"""Hadamard and random orthogonal matrices, and fast products with Hadamard matrices.

Defines ``hadamard_matrix``, ``apply_hadamard``, ``random_signs``, ``random_hadamard`` and
``random_orthogonal``; ``hadamard_factors`` and ``is_reachable`` come from ``hadamard_orders``. A
product takes fewer than n**2 operations per row. Methods.md section 6.4 (QuaRot, arXiv 2404.00456).
Convention: rows are tokens, x -> x R. A matrix with a Paley I or Williamson core is not symmetric,
so the weight takes the same map along its input dimension: ``apply_hadamard(x) @
apply_hadamard(weight).T == x @ weight.T``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..ground.errors import ConfigError
from .hadamard_orders import WILLIAMSON, construction, hadamard_factors, is_reachable, prime_power, quadratic_character

__all__ = [
    "apply_hadamard",
    "hadamard_factors",
    "hadamard_matrix",
    "is_reachable",
    "random_hadamard",
    "random_orthogonal",
    "random_signs",
]

# Products with fewer columns than this are much slower per column (measured on CPU: 8 columns cost
# 7 times as much as 16).
SMALLEST_FACTOR = 16
LARGEST_DENSE = 64


def _jacobsthal(q: int) -> Tensor:
    """Q[a, b] = chi(a - b) over the field of q elements, (q, q) int8: 0 on the diagonal, else
    +-1."""
    p, m = prime_power(q)
    elements = torch.arange(q, device="cpu")
    difference = torch.zeros(q, q, dtype=torch.long, device="cpu")
    for place in (p**i for i in range(m)):
        digit = elements // place % p
        difference += (digit[:, None] - digit[None, :]) % p * place
    return torch.tensor(quadratic_character(q), dtype=torch.int8, device="cpu")[difference]


def _bordered(q: int, corner: int) -> Tensor:
    """Jacobsthal matrix with a border of ones, (q + 1, q + 1) int8.

    The first row is +1, the first column ``corner``.
    """
    border = torch.zeros(q + 1, q + 1, dtype=torch.int8, device="cpu")
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, corner, _jacobsthal(q)
    return border


def _paley_1(q: int) -> Tensor:
    """Paley's first construction, order q + 1: I + S with S skew-symmetric, S S^T = q I."""
    return _bordered(q, -1) + torch.eye(q + 1, dtype=torch.int8, device="cpu")


def _paley_2(q: int) -> Tensor:
    """Paley's second construction, order 2 (q + 1).

    Every zero and sign of a symmetric conference matrix becomes a 2 x 2 block.
    """
    sign = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(_bordered(q, 1), sign) + torch.kron(torch.eye(q + 1, dtype=torch.int8, device="cpu"), zero)


def _williamson(m: int) -> Tensor:
    """Williamson's array of order 4m, from four symmetric circulants A, B, C, D of odd order m.

    They satisfy A^2 + B^2 + C^2 + D^2 = 4m I.
    """
    half = (m + 1) // 2
    index = torch.arange(m, device="cpu")
    distance = (index[:, None] - index[None, :]) % m
    mirrored = torch.minimum(distance, m - distance)
    rows = [[1 if bits >> (half - 1 - i) & 1 else -1 for i in range(half)] for bits in WILLIAMSON[4 * m]]
    a, b, c, d = (torch.tensor(row, dtype=torch.int8, device="cpu")[mirrored] for row in rows)
    return torch.cat(
        [torch.cat(blocks, dim=1) for blocks in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))]
    )


_BUILDERS = {
    "trivial": lambda q: torch.ones(q, q, dtype=torch.int8, device="cpu"),
    "paley_1": _paley_1,
    "paley_2": _paley_2,
    "williamson": _williamson,
}


def _doubled(matrix: Tensor, times: int) -> Tensor:
    """Sylvester doubling on the right: ``matrix`` (x) H_2 (x) ... (x) H_2."""
    pair = torch.tensor([[1, 1], [1, -1]], dtype=matrix.dtype, device=matrix.device)
    for _ in range(times):
        matrix = torch.kron(matrix, pair)
    return matrix


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Hadamard matrix H of order ``n``: (n, n), entries +-1, H H^T = n I; a new CPU tensor per
    call.

    H = core (x) H_2 (x) ... (x) H_2, with the core of :func:`hadamard_factors`. Raises
    :class:`ConfigError` if no construction reaches n.
    """
    k, power = hadamard_factors(n)
    name, q = construction(k)
    return _doubled(_BUILDERS[name](q).to(dtype), power)


def _split(k: int, power: int) -> int:
    """Order of the right factor, a power of two; 1 means a single dense factor.

    Both products are small and neither has few columns.
    """
    if k << power <= LARGEST_DENSE or 1 << power < SMALLEST_FACTOR:
        return 1
    return min(
        (1 << t for t in range(power + 1) if 1 << t >= SMALLEST_FACTOR),
        key=lambda right: ((k << power) // right + right, -right),
    )


@lru_cache(maxsize=64)
def _factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(left^T / sqrt(n), right) with H = left (x) right; cached, do not modify.

    Computed outside inference mode: autograd would refuse a cached tensor made within it.
    """
    k, power = hadamard_factors(n)
    right = _split(k, power)
    with torch.inference_mode(False), torch.no_grad():
        left = hadamard_matrix(n // right, dtype).T.contiguous() / n**0.5
        return left.to(device), hadamard_matrix(right, dtype).to(device)


def apply_hadamard(x: Tensor, transposed: bool = False) -> Tensor:
    """x @ H / sqrt(n) along the last dimension (..., n), H = ``hadamard_matrix(n)``;
    differentiable.

    The map is orthonormal; ``transposed`` applies H^T / sqrt(n), its inverse.

    It takes two dense products of about sqrt(n) columns each, (H_left^T X) H_right, with every row
    as a matrix X. 16-bit input is computed in float32 and rounded once (the sum of an outlier
    overflows float16), other floating types in their own precision; the result has the type of
    ``x``.
    """
    if not x.is_floating_point():
        raise ConfigError(f"apply_hadamard: dtype {x.dtype} is not accepted; a floating-point tensor is needed")
    work = x.float() if x.element_size() < 4 else x
    left, right = _factors(x.shape[-1], work.dtype, x.device)
    left, right = (left.T, right.T) if transposed else (left, right)
    if right.shape[0] == 1:
        return (work @ left.T).to(x.dtype)
    rows = work.unflatten(-1, (left.shape[0], right.shape[0]))
    return torch.matmul(left, rows @ right).flatten(-2).to(x.dtype)


def random_signs(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random +-1 signs (n,): the diagonal of :func:`random_hadamard` for the same seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (torch.randint(0, 2, (n,), generator=generator, device="cpu") * 2 - 1).to(dtype)


def random_hadamard(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """R = diag(signs) H / sqrt(n), (n, n) orthogonal, so that x R = apply_hadamard(x * signs).

    Signs are applied before the mixing: after it (H diag(signs)) they would only flip outputs,
    which has no effect on a symmetric quantizer.
    """
    return random_signs(n, seed, dtype)[:, None] * (hadamard_matrix(n, dtype) / n**0.5)


def random_orthogonal(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random orthogonal (n, n) matrix from the Haar measure, for any n >= 1, computed in float64.

    QR of a Gaussian matrix; unless the signs of R's diagonal are moved into Q the distribution is
    not Haar (Mezzadri, math-ph/0609050).
    """
    if n < 1:
        raise ConfigError(f"no orthogonal matrix of order {n}: a positive integer is accepted")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu"))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).to(dtype)
