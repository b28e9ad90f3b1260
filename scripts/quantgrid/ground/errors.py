"""Exceptions of quantgrid, and the texts of their messages.

``ConfigError``      invalid config, file or model: stops before or in its job, with the accepted
                     values.
``UnsupportedModel`` a decoder without a table in ``models/families.py``.
``NumericalFailure`` numerical breakdown of one cell (NaN, infinity, failed Cholesky
                     factorization): a result of the cell, not a crash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from .old_names import OLD_NAMES

LONGEST = 120  # maximum characters of a value in a message
_EXPONENT = re.compile(r"([-+]?[0-9]+)(\.[0-9]*)?[eE]([-+]?)([0-9]+)")


class ConfigError(ValueError):
    """Invalid input; the message names the key, file or cell, and the accepted values."""


class UnsupportedModel(ConfigError):
    """Model whose architecture has no table in quantgrid."""


class NumericalFailure(ArithmeticError):
    """Numerical breakdown of one cell, recorded as ``status: failed`` with this reason."""


def unknown_name(kind: str, name: object, accepted: Iterable[str]) -> str:
    """One-line message: the unknown ``name``, a hint, and all accepted names.

    The hint is the new name of a renamed one, or the closest accepted name.
    """
    names, written = (
        sorted(accepted),
        shortened(str(name).encode("unicode_escape").decode() if isinstance(name, str) else shown(name)),
    )
    return f"unknown {kind} '{written}'{name_hint(written, names)} Accepted: {', '.join(names)}"


def name_hint(written: str, names: list[str]) -> str:
    """End of a message about an unknown name: its new name if renamed, else the closest of
    ``names``, in capitals or not."""
    if (new := OLD_NAMES.get(written)) in names:
        return f" - it was renamed to '{new}'."
    by_lower_case = {name.lower(): name for name in reversed(names)}
    close = get_close_matches(written.lower(), by_lower_case, n=1)
    return f" - did you mean '{by_lower_case[close[0]]}'?" if close else "."


def require_named(key: str, word: str, known: list[str]) -> None:
    """Raise :class:`ConfigError`, with what there is, if the argument ``key`` of a command is empty."""
    if not word:
        raise ConfigError(f"{key}: none is named; name one, as in {key}={known[0]}; there are {', '.join(known)}")


def shown(value: object) -> str:
    """``value`` for a message: one line of at most :data:`LONGEST` characters."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # Python does not print integers of more than 4300 digits
        return "a value too large to be shown"


def text_hint(value: object) -> str:
    """Hint for text that looks like a number, else empty: YAML 1.1 reads 1e-5 as text."""
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
