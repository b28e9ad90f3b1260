"""Families of schemes that one server runs in one checkpoint. Standard library only.

vLLM takes a scheme per linear from compressed-tensors, of formats that it has kernels for on one kind of
weights. Facts are of vLLM 0.32: packed integers of 4 and 8 bits with scales per row or per group of 32,
64 or 128; NVFP4, whose fused linears share a global scale, next to FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..ground.errors import ConfigError
from ..schemes.quant_scheme import QuantScheme
from .compressed_formats import FLOAT, NVFP4, PACKED, weight_format

_BITS, _GROUPS = (4, 8), (None, 32, 64, 128)


def _is_packed_integer(scheme: QuantScheme) -> bool:
    fits = scheme.symmetric and scheme.element_format.bits in _BITS and scheme.group_size in _GROUPS
    return weight_format(scheme, None) == PACKED and fits and scheme.granularity != "tensor"


def _is_nvfp4_or_fp8(scheme: QuantScheme) -> bool:
    name = weight_format(scheme, None)
    return name == FLOAT or (name == NVFP4 and scheme.global_scale == "site")


# target -> family -> whether a scheme belongs to it
TARGETS: dict[str, dict[str, Callable[[QuantScheme], bool]]] = {
    "vllm": {
        "symmetric integers of 4 and 8 bits, per channel or in groups of 32, 64 or 128": _is_packed_integer,
        "NVFP4 with global_scale site, and FP8": _is_nvfp4_or_fp8,
    },
}


def require_one_family(target: str, schemes: Mapping[str, QuantScheme], where: str) -> None:
    """Raise :class:`ConfigError` if no family of ``target`` has all ``schemes`` (by name)."""
    families, named = TARGETS[target], [*schemes.items()]
    outside = {family: [name for name, scheme in named if not has(scheme)] for family, has in families.items()}
    family = min(outside, key=lambda name: len(outside[name]))
    if outside[family]:
        raise ConfigError(
            f"{where}: {target} cannot run {', '.join(repr(name) for name in schemes)} in one checkpoint: "
            f"{', '.join(map(repr, outside[family]))} not among {family}. Accepted are schemes of one of these "
            f"families: {'; '.join(families)}"
        )
