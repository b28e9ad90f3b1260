"""What a method declares of itself: its options, and what it asks of a model. Standard library only.

The code hash behind every path never covers this file: what it decides reaches a job through its specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, shown, text_hint, unknown_name

LARGEST = 10**9  # of a whole number that an option takes


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, and what values it takes (type of the default, range or choices).

    ``share``: a whole number that may also be given as a share between 0 and 1. ``needs`` lists (value, or None for any; another option;
    the values of that option without which this one would have no meaning), for an option that an entry states.
    """

    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] | None = None
    share: bool = False
    needs: tuple[tuple[Any, str, tuple[Any, ...]], ...] = ()

    def check(self, value: Any, where: str) -> Any:
        """``value`` in the default's type; raises :class:`ConfigError` that says what would be accepted."""
        kind = type(self.default)
        if type(value) is int and abs(value) > LARGEST and kind in (int, float):
            raise ConfigError(f"{where}: {shown(value)} is out of range; expected {self.describe()}, at most {LARGEST} in size")
        if self.share and type(value) is float and 0 < value < 1:
            return value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{where}: {shown(value)} is not accepted; expected {self.describe()}{text_hint(value) * (kind in (int, float))}")
        if self.choices is not None and any(item not in self.choices for item in (value if kind is list else [value])):
            raise ConfigError(f"{where}: {shown(value)} is not accepted; expected {self.describe()}")
        finite = kind is not float or math.isfinite(value)
        if not finite or (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum):
            raise ConfigError(f"{where}: {shown(value)} is out of range; expected {self.describe()}")
        return value

    def describe(self) -> str:
        kind = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list"}[type(self.default)]
        if self.choices:
            return ("a list of " if type(self.default) is list else "one of ") + ", ".join(map(str, self.choices))
        bounds = [f">= {self.minimum}" if self.minimum is not None else "", f"<= {self.maximum}" if self.maximum is not None else ""]
        return " ".join([kind, *filter(None, bounds), *["or a share between 0 and 1"] * self.share])

    def check_needs(self, value: Any, resolved: Mapping[str, Any], where: str) -> None:
        """Refuse ``value`` beside other options, ``resolved``, with which it means nothing."""
        for given, other, accepted in self.needs:
            if given in (None, value) and resolved[other] not in accepted:
                wanted = " or ".join(map(repr, accepted))
                raise ConfigError(f"{where}: {value!r} has no meaning with {other} {resolved[other]!r}; set {other} to {wanted}, or leave it out")


@dataclass(frozen=True)
class Method:
    """A transform or a mitigation: the module that holds it, its options, and what it asks of a model.

    ``hadamard`` names the sizes of the model that must have a Hadamard matrix, ``hadamard_of`` those that an option asks for: option ->
    its value, or one of its values, -> size. ``kronecker`` names the sizes that must split into a Kronecker product, ``block`` the option
    whose value must divide the inputs of the option ``sites``. ``instead`` says what to use where that does not fit.

    ``calibrated`` says that it is fitted to the statistics of calibration, ``fitted_to_scheme`` that its parameters depend on the scheme
    they were searched or learned against; either may be a mapping, option -> the values with which that is so. ``seeded`` says that its
    parameters depend on a seed. ``widest_input`` is the largest input dimension of a linear that it takes. A ``learned`` transform is
    trained after it was fitted, on the token windows of calibration if it is ``trained_on_windows``. A mitigation with ``training`` quantizes the
    whole model at once while it trains its ``scales`` or its ``weights`` on those windows; with the latter it is no post-training quantization.
    ``fine_scales``, in the form of ``calibrated``, says that it can do nothing with scales of weights that are powers of two.
    """

    module: str
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    hadamard: tuple[str, ...] = ()
    hadamard_of: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    kronecker: tuple[str, ...] = ()
    block: str = ""
    instead: str = "'scaling' or 'none'"
    calibrated: bool | Mapping[str, tuple[Any, ...]] = False
    fitted_to_scheme: bool | Mapping[str, tuple[Any, ...]] = False
    seeded: bool = False
    widest_input: int | None = None
    learned: bool = False
    trained_on_windows: bool = False
    training: str = ""
    fine_scales: bool | Mapping[str, tuple[Any, ...]] = False

    def is_calibrated(self, options: Mapping[str, Any]) -> bool:
        """Whether it reads the statistics of calibration with these resolved ``options``."""
        return _holds(self.calibrated, options)

    def is_fitted_to_scheme(self, options: Mapping[str, Any]) -> bool:
        """Whether its parameters depend on the schemes of the cell with these resolved ``options``."""
        return _holds(self.fitted_to_scheme, options)

    def needs_fine_scales(self, options: Mapping[str, Any]) -> bool:
        """Whether scales that are powers of two leave it nothing to do with these resolved ``options``."""
        return _holds(self.fine_scales, options)

    def hadamard_sizes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The sizes of the model that must have a Hadamard matrix with these resolved ``options``."""
        asked = [size for option, sizes in self.hadamard_of.items() for value, size in sizes.items()
                 if value == options[option] or (isinstance(options[option], list) and value in options[option])]
        return (*self.hadamard, *asked)

    def resolve(self, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The entry with every option filled in; ``method`` and, for a seeded method, ``seed`` stay beside the options."""
        given = {key: value for key, value in entry.items() if key not in ("method", "note") and not (key == "seed" and self.seeded)}
        for key in given:
            if key not in self.options:
                raise ConfigError(f"{where}: {unknown_name('option', key, self.options or ['(none)'])}")
        resolved = {name: option.check(given.get(name, option.default), f"{where}.{name}") for name, option in self.options.items()}
        for name in given:
            self.options[name].check_needs(resolved[name], resolved, f"{where}.{name}")
        return {"method": entry["method"], "options": resolved}


def _holds(condition: bool | Mapping[str, tuple[Any, ...]], options: Mapping[str, Any]) -> bool:
    return condition if isinstance(condition, bool) else any(options[option] in values for option, values in condition.items())
