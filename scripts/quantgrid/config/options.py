"""Declarations of the options of methods: defaults and accepted values. Standard library only.

The code hash in the paths does not cover this file: its contents reach a job through the job's
specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
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

    ``above`` and ``below`` are bounds that are not accepted themselves. ``share``: an integer that may also
    be given as a share between 0 and 1. ``divided_by``: another option, declared before, whose value (at
    least 1) divides the default. The others are checked for options stated in an entry. ``needs`` lists
    (value, or None for any; another option; the values of that option that give this one a meaning). Of a
    list, one of its items counts. ``needs_some``: value -> options of which it needs one above 0.
    ``at_most``: another option whose value (at least 1) is the largest one accepted.
    """

    default: Any
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None
    share: bool = False
    divided_by: str = ""
    needs: tuple[tuple[Any, str, tuple[Any, ...]], ...] = ()
    needs_some: Mapping[Any, tuple[str, ...]] = field(default_factory=dict)
    at_most: str = ""

    def default_with(self, resolved: Mapping[str, Any]) -> Any:
        """Default of an entry whose options declared before are ``resolved``."""
        return self.default / max(resolved[self.divided_by], 1) if self.divided_by else self.default

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
        if not finite or not all(holds(value, bound) for _, holds, bound in self._bounds()):
            raise ConfigError(f"{where}: {shown(value)} is out of range; expected {self.describe()}")
        return value

    def describe(self) -> str:
        kind = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list"}[
            type(self.default)
        ]
        if self.choices:
            return ("a list of " if type(self.default) is list else "one of ") + ", ".join(map(str, self.choices))
        bounds = [f"{sign} {bound}" for sign, _, bound in self._bounds()]
        return " ".join([kind, *bounds, *["or a share between 0 and 1"] * self.share])

    def _bounds(self) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
        """(sign, comparison, bound) of every bound that there is."""
        signs = ((">=", ge, self.minimum), (">", gt, self.above), ("<=", le, self.maximum), ("<", lt, self.below))
        return [(sign, holds, bound) for sign, holds, bound in signs if bound is not None]

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
        some = self.needs_some.get(value, ()) if self.needs_some else ()
        if some and not any(resolved[other] > 0 for other in some):
            given = " and ".join(f"{other} {resolved[other]!r}" for other in some)
            raise ConfigError(f"{where}: {value!r} has no meaning with {given}; set {' or '.join(some)} above 0")
        if self.at_most and value > (largest := max(resolved[self.at_most], 1)):
            raise ConfigError(
                f"{where}: {value!r} has no meaning with {self.at_most} {resolved[self.at_most]!r}; "
                f"expected at most {largest}"
            )
