"""Refusal of transforms that are not exact for a family of models, while the workflow is planned.

A rotation of the residual stream cannot pass a norm that stands before the stream, one of the values cannot
pass a gate of the outputs of attention, and a division needs weights before its site that can take it. Each
refusal names the substitute that is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ground.errors import ConfigError
from ..models.shapes import ModelShape
from .cells import Cell
from .methods import Method


def require_exact(method: Method, options: Mapping[str, Any], sizes: ModelShape, named: str, where: str) -> None:
    """Raise :class:`ConfigError` if a transform with these resolved ``options`` changes the function of a model.

    ``named`` is the transform and ``where`` the place in messages.
    """
    plan = sizes.family.plan  # all layers of a model have the same norms
    if plan.post_norms and method.rotates_stream(options):
        raise ConfigError(
            f"{where}: transform '{named}' rotates the residual stream, and a {sizes.architecture} adds to it behind "
            f"norms ({', '.join(plan.modules[norm] for norm in plan.post_norms)}), through which no rotation can be "
            f"folded; exact is {_substitute(method, 'residual', 'random_hadamard')}: two rotations a layer at run time"
        )
    if method.turns_values(options) and not all(site.turns for site in sizes.sites("output_input")):
        other = "'heads: across'" if method.turns else _substitute(method, "values", "random_hadamard")
        raise ConfigError(
            f"{where}: transform '{named}' turns the values within every head, and the outputs of attention of a "
            f"{sizes.architecture} pass a gate, through which no rotation can be folded; exact is {other}: the inputs "
            "of o are turned at run time"
        )
    sites = method.divided_sites(options)
    fixed = [kind for kind in sites if not all(site.is_divisible for site in sizes.sites(kind))]
    if fixed and not method.divides_online(options):
        raise ConfigError(
            f"{where}: transform '{named}' divides the inputs of {', '.join(fixed)}, and no weights of a "
            f"{sizes.architecture} can take the division there; exact is {_substitute(method, 'division', 'scaling')}, "
            "one multiplication a channel at run time, or leave the sites out"
        )


def require_one_router(paired: bool, sizes: ModelShape, cell: Cell, where: str) -> None:
    """Raise :class:`ConfigError` for a mitigation that reads ``paired`` statistics, on a model with experts.

    Paired statistics need the inputs of both models for one token, and the router may send it to different
    experts.
    """
    if sizes.experts and paired:
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' compares inputs with those of the unquantized model, which is "
            f"not supported for the experts of '{cell.model}', whose router may choose differently; use 'gptq' or "
            "'low_rank'"
        )


def _substitute(method: Method, option: str, other: str) -> str:
    return f"'{option}: online'" if option in method.options else f"the method '{other}' with '{option}: online'"
