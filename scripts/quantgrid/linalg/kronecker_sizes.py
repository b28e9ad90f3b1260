"""Kronecker factor sizes n = n1 x n2 by the rule of FlatQuant (arXiv 2410.09426).

Standard library only.
"""

from __future__ import annotations

from math import isqrt

from ..ground.errors import ConfigError


def has_kronecker_sizes(n: int) -> bool:
    """Check whether the rule splits ``n``: all positive numbers except 2, 6, 10, ... (2 mod 4).

    The others are differences of two squares.
    """
    return n > 0 and n % 4 != 2


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(n1, n2) = (a - b, a + b) for the smallest a with a² - n = b².

    This is the split of ``n`` nearest to a square with factors that differ by 2b. Raises
    :class:`ConfigError` for n = 2 mod 4, which is not a difference of squares (the published code
    never returns for it).
    """
    if not has_kronecker_sizes(n):
        raise ConfigError(
            f"no Kronecker split of {n}: 2 mod 4 is not a difference of two squares; "
            "odd sizes and multiples of 4 are accepted"
        )
    a = isqrt(n - 1) + 1
    while isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = isqrt(a * a - n)
    return a - b, a + b
