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

    ``hadamard`` names the sizes of the model that must have a Hadamard matrix; ``calibrated`` says that it is fitted to the
    statistics of calibration, ``fitted_to_scheme`` that its parameters depend on the scheme they were searched or learned
    against, ``seeded`` that they depend on a seed. ``kronecker`` names the sizes that must split into a Kronecker product. A ``learned``
    transform is trained after it was fitted, on the token windows of calibration if it is ``trained_on_windows``.
    """

    module: str
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    hadamard: tuple[str, ...] = ()
    kronecker: tuple[str, ...] = ()
    calibrated: bool = False
    fitted_to_scheme: bool = False
    seeded: bool = False
    learned: bool = False
    trained_on_windows: bool = False

    def resolve(self, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The entry with every option filled in; ``method`` and, for a seeded method, ``seed`` stay beside the options."""
        given = {key: value for key, value in entry.items() if key not in ("method", "note") and not (key == "seed" and self.seeded)}
        for key in given:
            if key not in self.options:
                raise ConfigError(f"{where}: {unknown_name('option', key, self.options or ['(none)'])}")
        resolved = {name: option.check(given.get(name, option.default), f"{where}.{name}") for name, option in self.options.items()}
        return {"method": entry["method"], "options": resolved}


SCALING_SITES = Option(["attention_input", "mlp_input"], choices=("attention_input", "mlp_input", "output_input", "down_input"))
GPTQ = {"damping": Option(0.01, minimum=0.0), "block_size": Option(128, minimum=1), "activation_order": Option(False)}
HADAMARD = ("hidden_size", "head_dim", "intermediate_size")
LEARNED = {"seeded": True, "learned": True}
ON_WINDOWS = {**LEARNED, "fitted_to_scheme": True, "trained_on_windows": True}


def training(steps: int, batch_size: int, **rates: float) -> dict[str, Option]:
    """Options of every learned transform; ``steps`` of all parameters together or, where layers are trained one by one, of each layer."""
    return {"steps": Option(steps, minimum=0), "batch_size": Option(batch_size, minimum=1),
            "schedule": Option("cosine", choices=("cosine", "linear")),
            **{name: Option(rate, minimum=0.0) for name, rate in rates.items()}}


ERROR = Option("squared", choices=("squared", "relative"))
OBJECTIVE = {"objective": Option("end_to_end", choices=("end_to_end", "layer_wise")), "top": Option(1000, minimum=1), "round_weights": Option(False)}
LOSSES = ("cross_entropy", "kl_top")
LOW_RANK = {"rank": Option(32, minimum=0), "metric": Option("plain", choices=("plain", "exact"))}

TRANSFORMS: dict[str, Method] = {
    "none": Method("transforms.none", "the model as it is"),
    "scaling": Method("transforms.scaling", "SmoothQuant: channels scaled between activation and weight",
                      {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "sites": SCALING_SITES}, calibrated=True),
    "random_hadamard": Method("transforms.random_hadamard", "randomized Hadamard rotations R1, R2 offline and R4 online (QuaRot, SpinQuant)",
                              hadamard=HADAMARD, seeded=True),
    "optimized_scaling": Method("transforms.optimized_scaling", "OmniQuant: channel scales and weight clipping learned layer by layer",
                                {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "error": ERROR,
                                 **training(400, 1, learning_rate=5e-3, clip_learning_rate=1e-2)}, calibrated=True, **ON_WINDOWS),
    "optimized_rotation": Method("transforms.optimized_rotation", "SpinQuant: rotations R1, R2 learned, R4 a fixed Hadamard transform",
                                 {**OBJECTIVE, "loss": Option("cross_entropy", choices=LOSSES), **training(100, 8, learning_rate=2e-3)},
                                 hadamard=HADAMARD, **ON_WINDOWS),
    "optimized_rotation_scaling": Method("transforms.optimized_rotation_scaling", "OSTQuant: rotations and channel scales learned together",
                                         {**OBJECTIVE, "loss": Option("kl_top", choices=LOSSES),
                                          **training(100, 8, learning_rate=2e-3, scale_learning_rate=2e-3)}, hadamard=HADAMARD, **ON_WINDOWS),
    "flatquant": Method("transforms.flatquant", "FlatQuant: Kronecker products, channel scales and weight clipping learned layer by layer",
                        {"alpha": Option(0.3, minimum=0.0, maximum=1.0), "error": ERROR,
                         **training(480, 4, learning_rate=5e-3, clip_learning_rate=5e-2)},
                        kronecker=("hidden_size", "intermediate_size"), calibrated=True, **ON_WINDOWS),
    "data_free_rotation": Method("transforms.data_free_rotation", "rotations R1, R2 learned from the weights alone, R4 a fixed Hadamard transform",
                                 {"goal": Option("minimize", choices=("minimize", "maximize")), **training(100, 4, learning_rate=2e-3)},
                                 hadamard=HADAMARD, **LEARNED),
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
