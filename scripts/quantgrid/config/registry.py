"""Registry of methods: name -> module, options, requirements. Standard library only.

The entries are in ``transform_methods`` and ``mitigation_methods``. A new method is one file in its
folder, one entry there and one entry in a config. The code hash behind every path covers none of
these tables, so a new entry reruns nothing. A job imports the module of its method and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from .methods import Method
from .mitigation_methods import MITIGATIONS, PROPAGATION, RANGE
from .transform_methods import TRANSFORMS

METHODS: dict[str, dict[str, Method]] = {"transforms": TRANSFORMS, "mitigations": MITIGATIONS}


def method(axis: str, name: str, where: str = "") -> Method:
    """Look up the method ``name`` of ``axis`` (``transforms`` or ``mitigations``); :class:`ConfigError` tells
    a method of the other axis and a name that stands for settings from an unknown one."""
    if name in METHODS[axis]:
        return METHODS[axis][name]
    for other in METHODS.keys() - {axis}:
        if name in METHODS[other]:
            raise ConfigError(f"{where or axis}: '{name}' is a method of {other}, not of {axis}")
    if name in PUBLISHED[axis]:
        settings = ", ".join(f"{key}: {value}" for key, value in PUBLISHED[axis][name].items())
        raise ConfigError(f"{where or axis}: '{name}' stands for {{{settings}}}; a study names it without an entry")
    raise ConfigError(f"{where or axis}: {unknown_name('method', name, METHODS[axis])}")


# Entries under published names with the settings of their publication, which a config may use without
# stating them, and replace. A method under its own name has the defaults of the registry.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "transforms": {
        "smoothquant": {"method": "scaling", "alpha": 0.5},
        "hadamard": {"method": "random_hadamard"},
        "omniquant": {"method": "optimized_scaling"},
        "spinquant": {"method": "optimized_rotation", "gradient": "identity"},
        "ostquant": {"method": "optimized_rotation_scaling"},
    },
    "mitigations": {
        "gptq_published": {"method": "gptq", "propagation": "sequential", "weight_range": "mse"},
        "autoround": {"method": "learned_rounding"},
        "qad": {"method": "qat_finetune", "warmup": 0.05},
    },
}

# the module that propagates; only cells that ask for it depend on it
SEQUENTIAL = "quantization.sequential"


def is_paired(*names: str | None) -> bool:
    """Check whether one of these mitigations (a method, its base or None) needs paired statistics."""
    return any(METHODS["mitigations"][name].paired for name in names if name is not None)


def split_propagation(resolved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split a resolved mitigation into the options of its function and the settings of sequential
    propagation; None: cached.

    ``paired``: the unquantized model runs in parallel, as some methods require.
    """
    options = {name: value for name, value in resolved["options"].items() if name not in {*PROPAGATION, *RANGE}}
    own = {**resolved, "options": options}
    if resolved["options"].get("propagation") != "sequential":
        return own, None
    paired = is_paired(resolved["method"], options.get("base"))
    return own, {"quantized_activations": resolved["options"]["quantized_activations"], "paired": paired}


def costs(name: str, options: Mapping[str, Any]) -> set[str]:
    """Factorizations of each linear by a mitigation (``Method.costs``), its base's included."""
    return {*method("mitigations", name).costs, *method("mitigations", options.get("base", name)).costs}


def load(axis: str, name: str) -> ModuleType:
    """Import the module of one method."""
    return import_module(f"quantgrid.{method(axis, name).module}")
