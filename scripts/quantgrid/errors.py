"""The three ways in which quantgrid says no.

``ConfigError``      the config, a file or a model is not what was asked for: stops before or at its job, with what would be accepted.
``UnsupportedModel`` a decoder that the tables of ``architecture.py`` do not describe.
``NumericalFailure`` the arithmetic of one cell broke down (NaN, infinity, no Cholesky factor): the cell's result, not a crash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 120  # characters of a value that a message repeats
_EXPONENT = re.compile(r"([-+]?[0-9]+)(\.[0-9]*)?[eE]([-+]?)([0-9]+)")


class ConfigError(ValueError):
    """Input that cannot be used; the message names the key, the file or the cell, and what would be accepted."""


class UnsupportedModel(ConfigError):
    """A model whose architecture quantgrid has no table for."""


class NumericalFailure(ArithmeticError):
    """Arithmetic that broke down for one cell: recorded as ``status: failed`` with this reason."""


def unknown_name(kind: str, name: object, accepted: Iterable[str]) -> str:
    """One line: the unknown ``name``, the closest accepted one, and all accepted ones."""
    names, written = sorted(accepted), shortened(str(name).encode("unicode_escape").decode() if isinstance(name, str) else shown(name))
    close = get_close_matches(written, names, n=1)
    hint = f" - did you mean '{close[0]}'?" if close else "."
    return f"unknown {kind} '{written}'{hint} Accepted: {', '.join(names)}"


def shown(value: object) -> str:
    """``value`` as a message repeats it: one line of at most :data:`LONGEST` characters."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        return "a value too large to be shown"


def text_hint(value: object) -> str:
    """Advice for a text in place of a number that looks like one, empty for anything else: YAML 1.1 reads 1e-5 as text."""
    if not isinstance(value, str) or len(value) > LONGEST:
        return ""
    if found := _EXPONENT.fullmatch(value):
        whole, fraction, sign, exponent = found.groups()
        return f" (text in YAML; write {whole}{fraction or '.0'}e{sign or '+'}{exponent})"
    return " (text in YAML; write the number without quotes)" if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?", value) else ""


def shortened(text: str) -> str:
    """``text`` in one line of at most :data:`LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 20]}... ({len(line)} characters)"
