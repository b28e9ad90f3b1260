"""A default in the signature of a method is the one that the registry resolves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest

from quantgrid.config import registry
from quantgrid.mitigations.methods.bases import solve_base

GIVEN = {"seed", "schemes", "global_scale"}  # by the job, from its specification or the weights; no options
# (method, function, parameter) without a counterpart in the registry, and the reason
DIFFERENT = {
    ("optimized_rotation", "learn", "scale_learning_rate"): "has no scales",
    ("optimized_rotation_scaling", "learn", "scale_learning_rate"): "the function of optimized_rotation",
}


def functions() -> Iterator[tuple[str, str, str, Callable]]:
    """(axis, method, name of the function, function) of all methods; those of bases too."""
    for name in registry.TRANSFORMS:
        module = registry.load("transforms", name)
        for function in ("primitives", "learn"):
            if hasattr(module, function):
                yield "transforms", name, function, getattr(module, function)
    for name, method in registry.MITIGATIONS.items():
        function = method.module.rpartition(".")[2]
        if name != "none":
            yield "mitigations", name, function, getattr(registry.load("mitigations", name), function)
        if "base" in method.options:
            yield "mitigations", name, "solve_base", solve_base


def stated(function: Callable) -> dict[str, object]:
    """The parameters with a default, without those that the job gives."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty and parameter.name not in GIVEN
    }


@pytest.mark.parametrize(("axis", "name", "function", "called"), list(functions()))
def test_a_default_of_a_signature_is_that_of_the_registry(axis, name, function, called):
    options = registry.method(axis, name).options
    for parameter, default in stated(called).items():
        if (name, function, parameter) not in DIFFERENT:
            wanted = options[parameter].default
            found = list(default) if isinstance(default, tuple) else default
            assert (type(found), found) == (type(wanted), wanted), parameter


def test_the_exceptions_differ():
    found = {
        (name, function, parameter)
        for axis, name, function, called in functions()
        for parameter, default in stated(called).items()
        if getattr(registry.method(axis, name).options.get(parameter), "default", None) != default
        and not isinstance(default, tuple)
    }
    assert found == DIFFERENT.keys()


def test_signatures_with_defaults_are_found():
    found = {name: set(stated(called)) for _, name, _, called in functions()}
    assert {"damping", "block_size", "activation_order", "scales"} == found["gptq"]
    assert {"rotations", "basis"} <= found["random_hadamard"]
