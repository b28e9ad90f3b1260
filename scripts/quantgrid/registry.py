"""What exists, as data: method name -> module, options, capabilities. Standard library only.

A job imports the module of its own method and no other. A new method is one file in its folder, one line here and one entry
in a config. The code hash behind every path never covers this file, so that a new line reruns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from .errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, and what values it takes (type of the default, range or choices)."""

    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] | None = None

    def check(self, value: Any, where: str) -> Any:
        """``value`` in the default's type; raises :class:`ConfigError` that says what would be accepted."""
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{where}: {value!r} is not accepted; expected {self.describe()}")
        if self.choices is not None and any(item not in self.choices for item in (value if kind is list else [value])):
            raise ConfigError(f"{where}: {value!r} is not accepted; expected {self.describe()}")
        finite = kind is not float or math.isfinite(value)
        if not finite or (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum):
            raise ConfigError(f"{where}: {value!r} is out of range; expected {self.describe()}")
        return value

    def describe(self) -> str:
        kind = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list"}[type(self.default)]
        if self.choices:
            return ("a list of " if type(self.default) is list else "one of ") + ", ".join(map(str, self.choices))
        bounds = [f">= {self.minimum}" if self.minimum is not None else "", f"<= {self.maximum}" if self.maximum is not None else ""]
        return " ".join([kind, *filter(None, bounds)])


@dataclass(frozen=True)
class Method:
    """A transform or a mitigation: the module that holds it, its options, and what it asks of a model.

    ``hadamard`` names the sizes of the model that must have a Hadamard matrix, ``hadamard_of`` those that an option asks for: option ->
    its value, or one of its values, -> size. ``block`` names the option whose value must divide the inputs of the option ``sites``.
    ``instead`` says what to use where that does not fit. ``calibrated`` says that it is fitted to the statistics of calibration,
    ``fitted_to_scheme`` that its parameters depend on the scheme they were searched or learned against; either may be a mapping, option
    -> the values with which that is so. ``seeded`` says that its parameters depend on a seed.
    """

    module: str
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    hadamard: tuple[str, ...] = ()
    hadamard_of: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    block: str = ""
    instead: str = "'scaling' or 'none'"
    calibrated: bool | Mapping[str, tuple[Any, ...]] = False
    fitted_to_scheme: bool | Mapping[str, tuple[Any, ...]] = False
    seeded: bool = False

    def is_calibrated(self, options: Mapping[str, Any]) -> bool:
        """Whether it reads the statistics of calibration with these resolved ``options``."""
        return _holds(self.calibrated, options)

    def is_fitted_to_scheme(self, options: Mapping[str, Any]) -> bool:
        """Whether its parameters depend on the schemes of the cell with these resolved ``options``."""
        return _holds(self.fitted_to_scheme, options)

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
        return {"method": entry["method"], "options": resolved}


def _holds(condition: bool | Mapping[str, tuple[Any, ...]], options: Mapping[str, Any]) -> bool:
    return condition if isinstance(condition, bool) else any(options[option] in values for option, values in condition.items())


SITE_NAMES = ("attention_input", "output_input", "mlp_input", "down_input")
ALL_SITES = Option(list(SITE_NAMES), choices=SITE_NAMES)
SCALING_SITES = Option(["attention_input", "mlp_input"], choices=SITE_NAMES)
STATISTIC = ("maximum", "mean", "rms")
CENTER = Option("midrange", choices=("midrange", "mean"))
ROTATIONS = {"rotations": Option(["R1", "R2", "R4"], choices=("R1", "R2", "R4")), "basis": Option("none", choices=("none", "activations", "weights"))}
GPTQ = {"damping": Option(0.01, minimum=0.0), "block_size": Option(128, minimum=1), "activation_order": Option(False)}
LOW_RANK = {"rank": Option(32, minimum=0), "metric": Option("plain", choices=("plain", "exact"))}

TRANSFORMS: dict[str, Method] = {
    "none": Method("transforms.none", "the model as it is"),
    "shifting": Method("transforms.shifting", "channels centred, online where no bias can take it (Outlier Suppression+)",
                       {"center": CENTER, "sites": ALL_SITES}, calibrated=True),
    "scaling": Method("transforms.scaling", "SmoothQuant: channels scaled between activation and weight",
                      {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "sites": SCALING_SITES, "statistic": Option("maximum", choices=STATISTIC),
                       "search": Option(False), "points": Option(21, minimum=2), "round_activations": Option(True)},
                      calibrated=True, fitted_to_scheme={"search": (True,)}),
    "awq": Method("transforms.awq", "AWQ: scaling by a searched power of the mean magnitude",
                  {"sites": ALL_SITES, "points": Option(20, minimum=1), "round_activations": Option(False), "clip": Option(False),
                   "clip_steps": Option(10, minimum=1)}, calibrated=True, fitted_to_scheme=True),
    "outlier_suppression_plus": Method("transforms.outlier_suppression_plus", "OS+: channels centred, scaled to a searched threshold",
                                       {"sites": ALL_SITES, "center": CENTER, "points": Option(40, minimum=1),
                                        "lowest": Option(0.1, minimum=1e-6), "round_activations": Option(True)},
                                       calibrated=True, fitted_to_scheme=True),
    "random_hadamard": Method("transforms.random_hadamard", "randomized Hadamard rotations R1, R2 offline and R4 online (SpinQuant without learning)",
                              ROTATIONS, hadamard_of={"rotations": {"R1": "hidden_size", "R2": "head_dim", "R4": "intermediate_size"}},
                              instead="'scaling' or 'none', or leave it out of 'rotations',", calibrated={"basis": ("activations",)}, seeded=True),
    "random_orthogonal": Method("transforms.random_orthogonal", "Haar rotations R1, R2 offline, Hadamard R4 online",
                                {**ROTATIONS, "heads": Option("orthogonal", choices=("orthogonal", "hadamard"))},
                                hadamard_of={"rotations": {"R4": "intermediate_size"}, "heads": {"hadamard": "head_dim"}},
                                instead="'rotations' without R4 and 'heads: orthogonal'", calibrated={"basis": ("activations",)}, seeded=True),
    "quarot": Method("transforms.quarot", "QuaRot: random Hadamard rotations with the heads mixed online",
                     {"mixing": Option("hadamard", choices=("hadamard", "orthogonal"))}, hadamard=("hidden_size", "head_dim", "intermediate_size"),
                     hadamard_of={"mixing": {"hadamard": "heads"}},
                     instead="'random_hadamard', which mixes no heads, or 'mixing: orthogonal'", seeded=True),
    "block_hadamard": Method("transforms.block_hadamard", "Hadamard matrices on blocks of channels, online at every site (MR-GPTQ)",
                             {"block_size": Option(32, choices=(16, 32, 64, 128)), "sites": ALL_SITES, "fold_heads": Option(False)},
                             block="block_size"),
    "duquant": Method("transforms.duquant", "DuQuant: scaling, greedy block rotation, zigzag permutation, block rotation",
                      {"alpha": Option(0.6, minimum=0.0, maximum=1.0), "block_size": Option(128, minimum=2), "steps": Option(256, minimum=0),
                       "sites": ALL_SITES}, block="block_size", calibrated=True, seeded=True),
    "reorder": Method("transforms.reordering", "channels in the order of their magnitude (Atom, without its INT8 channels)",
                      {"statistic": Option("rms", choices=STATISTIC), "sites": ALL_SITES, "heads": Option("across", choices=("across", "within"))},
                      calibrated=True),
    "rotation_then_scaling": Method("transforms.rotation_then_scaling", "random Hadamard rotations, then SmoothQuant scaling of the rotated model",
                                    {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "statistic": Option("maximum", choices=STATISTIC),
                                     "sites": Option(["attention_input", "mlp_input"], choices=SITE_NAMES[:3])},
                                    hadamard=("hidden_size", "head_dim", "intermediate_size"), calibrated=True, seeded=True),
}

MITIGATIONS: dict[str, Method] = {
    "none": Method("mitigations.none", "nothing is quantized; for the format bf16 only"),
    "rtn": Method("mitigations.rtn", "round to nearest"),
    "gptq": Method("mitigations.gptq", "GPTQ: rounding errors offset by the columns not yet rounded", GPTQ),
    "low_rank": Method("mitigations.low_rank", "round to nearest, and a low-rank term for its error", LOW_RANK),
    "gptq_low_rank": Method("mitigations.gptq_low_rank", "GPTQ, and a low-rank term for its error", {**GPTQ, **LOW_RANK}),
}

METHODS: dict[str, dict[str, Method]] = {"transforms": TRANSFORMS, "mitigations": MITIGATIONS}


def method(axis: str, name: str, where: str = "") -> Method:
    """The registered method ``name`` of ``axis`` (``transforms`` or ``mitigations``)."""
    if name not in METHODS[axis]:
        raise ConfigError(f"{where or axis}: {unknown_name('method', name, METHODS[axis])}")
    return METHODS[axis][name]


def load(axis: str, name: str) -> ModuleType:
    """Import the module of one method."""
    return import_module(f"quantgrid.{method(axis, name).module}")
