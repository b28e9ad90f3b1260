"""The three ways in which quantgrid says no.

``ConfigError``      the config, a file or a model is not what was asked for: stops before or at its job, with what would be accepted.
``UnsupportedModel`` a decoder that the tables of ``architecture.py`` do not describe.
``NumericalFailure`` the arithmetic of one cell broke down (NaN, infinity, no Cholesky factor): the cell's result, not a crash.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """Input that cannot be used; the message names the key, the file or the cell, and what would be accepted."""


class UnsupportedModel(ConfigError):
    """A model whose architecture quantgrid has no table for."""


class NumericalFailure(ArithmeticError):
    """Arithmetic that broke down for one cell: recorded as ``status: failed`` with this reason."""


def unknown_name(kind: str, name: object, accepted: Iterable[str]) -> str:
    """One line: the unknown ``name``, the closest accepted one, and all accepted ones."""
    names = sorted(accepted)
    close = get_close_matches(str(name), names, n=1)
    hint = f" - did you mean '{close[0]}'?" if close else "."
    return f"unknown {kind} '{name}'{hint} Accepted: {', '.join(names)}"
