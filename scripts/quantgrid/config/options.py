"""Declarations of the options of methods: defaults and accepted values. Standard library only.

The code hash in the paths does not cover this file: its contents reach a job through the job's
specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ground.errors import ConfigError, shown, text_hint

LARGEST = 10**9  # limit of integer options


def as_list(value: Any) -> list[Any]:
    """Items of an option's ``value``: those of a list, else the value itself."""
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Option:
    """One option of a method: its default and accepted values (type of the default, range or
    choices).

    ``share``: an integer that may also be given as a share between 0 and 1. ``needs`` lists (value,
    or None for any; another option; the values of that option that give this one a meaning),
    checked for options stated in an entry. Of a list, one of its items counts.
    """

    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] | None = None
    share: bool = False
    needs: tuple[tuple[Any, str, tuple[Any, ...]], ...] = ()

    def check(self, value: Any, where: str) -> Any:
        """Return ``value`` in the default's type; :class:`ConfigError` names the accepted
        values."""
        kind = type(self.default)
        if type(value) is int and abs(value) > LARGEST and kind in (int, float):
            raise ConfigError(
                f"{where}: {shown(value)} is out of range; expected {self.describe()}, at most {LARGEST} in size"
            )
        if self.share and type(value) is float and 0 < value < 1:
            return value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(
                f"{where}: {shown(value)} is not accepted; expected "
                f"{self.describe()}{text_hint(value) * (kind in (int, float))}"
            )
        if self.choices is not None and any(item not in self.choices for item in (value if kind is list else [value])):
            raise ConfigError(f"{where}: {shown(value)} is not accepted; expected {self.describe()}")
        finite = kind is not float or math.isfinite(value)
        if (
            not finite
            or (self.minimum is not None and value < self.minimum)
            or (self.maximum is not None and value > self.maximum)
        ):
            raise ConfigError(f"{where}: {shown(value)} is out of range; expected {self.describe()}")
        return value

    def describe(self) -> str:
        kind = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list"}[
            type(self.default)
        ]
        if self.choices:
            return ("a list of " if type(self.default) is list else "one of ") + ", ".join(map(str, self.choices))
        bounds = [
            f">= {self.minimum}" if self.minimum is not None else "",
            f"<= {self.maximum}" if self.maximum is not None else "",
        ]
        return " ".join([kind, *filter(None, bounds), *["or a share between 0 and 1"] * self.share])

    def check_needs(self, value: Any, resolved: Mapping[str, Any], where: str) -> None:
        """Reject ``value`` if the other ``resolved`` options give it no meaning."""
        for given, other, accepted in self.needs:
            if given is not None and given not in as_list(value):
                continue
            if not any(item in accepted for item in as_list(resolved[other])):
                wanted = " or ".join(map(repr, accepted))
                raise ConfigError(
                    f"{where}: {value!r} has no meaning with {other} {resolved[other]!r}; set {other} to "
                    f"{wanted}, or leave it out"
                )
