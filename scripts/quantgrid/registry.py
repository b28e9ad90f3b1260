"""What exists, as data: method name -> module, options, capabilities. Standard library only.

A job imports the module of its own method and no other. A new method is one file in its folder, one line here and one entry
in a config. The code hash behind every path never covers this file, so that a new line reruns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any

from .errors import ConfigError, unknown_name


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
        if self.share and type(value) is float and 0 < value < 1:
            return value
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

    ``hadamard`` names the sizes of the model that must have a Hadamard matrix; ``calibrated`` says that it is fitted to the
    statistics of calibration, ``fitted_to_scheme`` that its parameters depend on the scheme they were searched or learned
    against, ``seeded`` that they depend on a seed; ``widest_input`` is the largest input dimension of a linear that it takes.
    """

    module: str
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    hadamard: tuple[str, ...] = ()
    calibrated: bool = False
    fitted_to_scheme: bool = False
    seeded: bool = False
    widest_input: int | None = None

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


SCALING_SITES = Option(["attention_input", "mlp_input"], choices=("attention_input", "mlp_input", "output_input", "down_input"))
METRICS = ("plain", "lqer", "qera_approx", "qera_exact")
PROPAGATION = {"propagation": Option("cached", choices=("cached", "sequential")),
               "quantized_activations": Option(False, needs=((None, "propagation", ("sequential",)),))}
SOLVER = {"damping": Option(0.01, minimum=0.0), "block_size": Option(128, minimum=1)}
COLUMNS = {"activation_order": Option(False, needs=((True, "scales", ("static",)),)), "scales": Option("static", choices=("static", "running"))}
GPTQ = {**SOLVER, **COLUMNS, **PROPAGATION}
RANK = {"rank": Option(32, minimum=0, share=True)}
METRIC = {"metric": Option("plain", choices=METRICS)}
BRANCH = {"factors": Option("bf16", choices=("bf16", "fp8", "int8", "int4")),
          "branch_input": Option("quantized", choices=("quantized", "unquantized"))}


def _on(*bases: str) -> dict[str, Option]:
    """The option ``base``, its first name the default, with the options of GPTQ that the bases which have them take."""
    solvers, ordered = (tuple(base for base in bases if base in some) for some in (("gptq", "mr_gptq", "gptaq"), ("gptq", "gptaq")))
    return {"base": Option(bases[0], choices=bases, needs=(("gptaq", "propagation", ("sequential",)),)),
            **{name: replace(option, needs=(*option.needs, (None, "base", solvers))) for name, option in SOLVER.items()},
            **{name: replace(option, needs=(*option.needs, (None, "base", ordered))) for name, option in COLUMNS.items()}, **PROPAGATION}


TRANSFORMS: dict[str, Method] = {
    "none": Method("transforms.none", "the model as it is"),
    "scaling": Method("transforms.scaling", "SmoothQuant: channels scaled between activation and weight",
                      {"alpha": Option(0.5, minimum=0.0, maximum=1.0), "sites": SCALING_SITES}, calibrated=True),
    "random_hadamard": Method("transforms.random_hadamard", "randomized Hadamard rotations R1, R2 offline and R4 online (QuaRot, SpinQuant)",
                              hadamard=("hidden_size", "head_dim", "intermediate_size"), seeded=True),
}

MITIGATIONS: dict[str, Method] = {
    "none": Method("mitigations.none", "nothing is quantized; for the format bf16 only"),
    "rtn": Method("mitigations.rtn", "round to nearest"),
    "gptq": Method("mitigations.gptq", "GPTQ: rounding errors offset by the columns not yet rounded", GPTQ),
    "mr_gptq": Method("mitigations.mr_gptq", "MR-GPTQ: GPTQ in activation order, block scales of float formats searched",
                      {**SOLVER, "block_scales": Option("mse", choices=("mse", "minmax")), **PROPAGATION}),
    "gptaq": Method("mitigations.gptaq", "GPTAQ: GPTQ towards the full-precision output; sequential only",
                    {**GPTQ, "alpha": Option(0.25, minimum=0.0), "propagation": Option("sequential", choices=("sequential",))}),
    "low_rank": Method("mitigations.low_rank", "round to nearest, and a low-rank term for its error", {**RANK, **METRIC, **BRANCH, **PROPAGATION}),
    "gptq_low_rank": Method("mitigations.gptq_low_rank", "GPTQ, and a low-rank term for its error",
                            {**RANK, **METRIC, **BRANCH, **_on("gptq", "mr_gptq", "gptaq")}),
    "low_rank_first": Method("mitigations.low_rank_first", "SVDQuant: the leading part of the weight kept in 16 bits, the rest rounded",
                             {**RANK, **METRIC, **BRANCH, **_on("rtn", "gptq", "mr_gptq", "gptaq"), "iterations": Option(100, minimum=1)}),
    "caldera": Method("mitigations.caldera", "CALDERA: codes and a low-rank term fitted in turns",
                      {**RANK, **BRANCH, **_on("gptq", "mr_gptq", "gptaq", "rtn"), "iterations": Option(20, minimum=1)}),
    "sparse_outliers": Method("mitigations.sparse_outliers", "the weights of largest error kept in 16 bits, for the bytes of a rank",
                              {**RANK, "metric": Option("plain", choices=METRICS[:3]), **_on("rtn", "gptq", "mr_gptq", "gptaq")},
                              widest_input=65535),  # columns of outliers are stored in 16 bits
    "singular_domain": Method("mitigations.singular_domain", "round to nearest after a learned change of the singular values",
                              {"steps": Option(50, minimum=0), "learning_rate": Option(0.002, minimum=0.0), "bandwidth": Option(1, minimum=0),
                               **PROPAGATION}),
}

METHODS: dict[str, dict[str, Method]] = {"transforms": TRANSFORMS, "mitigations": MITIGATIONS}


def method(axis: str, name: str, where: str = "") -> Method:
    """The registered method ``name`` of ``axis`` (``transforms`` or ``mitigations``)."""
    if name not in METHODS[axis]:
        raise ConfigError(f"{where or axis}: {unknown_name('method', name, METHODS[axis])}")
    return METHODS[axis][name]


SEQUENTIAL = "propagation"  # the module that propagates; only cells that ask for it depend on it


def split_propagation(resolved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A resolved mitigation without the options that its function does not take, and how sequential propagation runs; None: cached.

    ``paired``: the unquantized model has to run beside, as GPTAQ asks for.
    """
    options = {name: value for name, value in resolved["options"].items() if name not in PROPAGATION}
    own = {**resolved, "options": options}
    if resolved["options"].get("propagation") != "sequential":
        return own, None
    paired = "gptaq" in (resolved["method"], options.get("base"))
    return own, {"quantized_activations": resolved["options"]["quantized_activations"], "paired": paired}


def load(axis: str, name: str) -> ModuleType:
    """Import the module of one method."""
    return import_module(f"quantgrid.{method(axis, name).module}")
