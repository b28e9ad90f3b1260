"""How a dimension is split for a Kronecker product: n = n1 x n2 by the rule of FlatQuant (arXiv 2410.09426). Standard library only."""

from __future__ import annotations

from math import isqrt

from .errors import ConfigError


def has_kronecker_sizes(n: int) -> bool:
    """Whether the rule splits ``n``: every positive number but 2, 6, 10, ... is a difference of two squares."""
    return n > 0 and n % 4 != 2


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(n1, n2) = (a - b, a + b) for the smallest a with a² - n = b²: the split of ``n`` nearest to a square whose halves differ by 2b.

    :class:`ConfigError` for n = 2 mod 4, which is no difference of squares (the published code never returns there).
    """
    if not has_kronecker_sizes(n):
        raise ConfigError(f"no Kronecker split of {n}: 2 mod 4 is no difference of two squares; sizes divisible by 4 and odd ones are")
    a = isqrt(n - 1) + 1
    while isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = isqrt(a * a - n)
    return a - b, a + b
