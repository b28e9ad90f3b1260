"""Reachable orders of Hadamard matrices and their constructions. Standard library only.

The grid imports this when the DAG is built. An order n is reached as n = k * 2**power: Sylvester
doubling of a core of order k, which is one of
Paley I   k = q + 1,     q = 3 mod 4;
Paley II  k = 2 (q + 1), q = 1 mod 4 (q a prime or a prime power in both);
Williamson  k = 172, four symmetric circulants of order 43;
or 1. Among cores of equal order a prime q precedes a prime power, and Paley I precedes Paley II.
Kronecker products of two cores would reach no further order below 33,000 (counted), so they are not
built.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count, product

from ..ground.errors import ConfigError

# Order -> the first half (middle included) of the first row of each circulant, most significant bit
# first, 1 = +1.
WILLIAMSON: dict[int, tuple[int, int, int, int]] = {172: (0x233D76, 0x37E14D, 0x3ACAF4, 0x31E930)}


def prime_power(q: int) -> tuple[int, int]:
    """(p, m) with q = p**m and p prime; (0, 0) if q is not a prime power."""
    if q < 2:
        return 0, 0
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else (0, 0)


@lru_cache(maxsize=4096)
def construction(k: int) -> tuple[str, int] | None:
    """Construction of a core of order k, or None.

    ``("paley_1", q)``, ``("paley_2", q)``, ``("williamson", 43)`` or ``("trivial", 1)``.
    """
    if k == 1:
        return "trivial", 1
    if k % 4:
        return None
    paley = [
        (name, q, prime_power(q)[1])
        for name, q, residue in (("paley_1", k - 1, 3), ("paley_2", k // 2 - 1, 1))
        if q % 4 == residue
    ]
    reached = sorted((m > 1, name, q) for name, q, m in paley if m)
    if reached:
        return reached[0][1:]
    return ("williamson", k // 4) if k in WILLIAMSON else None


def _smallest_core(n: int) -> int:
    """Smallest k with a construction and n = k * 2**power (n positive); 0 if there is none."""
    k = n // (n & -n)
    while k <= n:
        if construction(k):
            return k
        k *= 2
    return 0


def is_reachable(n: int) -> bool:
    """Check whether :func:`quantgrid.linalg.hadamard.hadamard_matrix` can build order ``n``."""
    return n > 0 and _smallest_core(n) > 0


def hadamard_factors(n: int) -> tuple[int, int]:
    """(k, power) with n = k * 2**power and the smallest core order k.

    Raises :class:`ConfigError` if no construction reaches n.
    """
    if not is_reachable(n):
        raise ConfigError(unreachable_message(n))
    k = _smallest_core(n)
    return k, (n // k).bit_length() - 1


def unreachable_message(n: int) -> str:
    """Message about an order that cannot be built, with alternatives."""
    if n < 1:
        return f"no Hadamard matrix of order {n}: a positive number of channels is accepted"
    below = next(m for m in range(n, 0, -1) if is_reachable(m))
    above = next(m for m in count(n) if is_reachable(m))
    block = max(d for d in range(1, n + 1) if n % d == 0 and is_reachable(d))
    blocks = f" or a block Hadamard of {n // block} blocks of {block}" if block > 2 else ""
    return (
        f"no Hadamard matrix of order {n}: Sylvester, Paley I/II and Williamson 172 do not reach it; "
        f"the nearest orders that they reach are {below} and {above}. "
        f"A random orthogonal matrix{blocks} fits {n} channels"
    )


def quadratic_character(q: int) -> list[int]:
    """Quadratic character chi(a) of every element a of the field of q = p**m elements.

    +1 for squares, -1 for non-squares, 0 for a = 0. Element a is the polynomial whose coefficients
    are the base-p digits of a, the constant first. The powers of a primitive element (the variable,
    modulo a monic polynomial of degree m found by trial) alternate between squares and non-squares.
    """
    p, m = prime_power(q)
    for reduction in product(range(p), repeat=m):
        powers = _powers_of_variable(reduction, p, q)
        if m and len(powers) == q - 1:
            character = [0] * q
            for exponent, element in enumerate(powers):
                character[element] = -1 if exponent % 2 else 1
            return character
    raise ConfigError(f"{q} is not the size of a finite field; a prime power is accepted")


def _powers_of_variable(reduction: tuple[int, ...], p: int, q: int) -> list[int]:
    """Elements 1, x, x**2, ... up to the first return to 1, where x**m = ``reduction``.

    The constant coefficient comes first.
    """
    m = len(reduction)
    if reduction[0] == 0:
        return []
    element, powers = [1] + [0] * (m - 1), []
    for _ in range(q - 1):
        powers.append(sum(digit * p**i for i, digit in enumerate(element)))
        carry, shifted = element[-1], [0, *element[:-1]]
        element = [(low + carry * r) % p for low, r in zip(shifted, reduction, strict=True)]
        if element[0] == 1 and not any(element[1:]):
            break
    return powers
