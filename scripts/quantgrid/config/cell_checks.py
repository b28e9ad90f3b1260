"""Rules for valid cells: a cell's method and format, and whether they fit its model. Standard
library only; this module reads no weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .. import schemes
from ..ground.errors import ConfigError
from ..linalg.hadamard_orders import is_reachable
from ..linalg.kronecker_sizes import has_kronecker_sizes
from ..models.plans import SITES
from ..models.shapes import ModelShape
from ..schemes.granularity import Granularity
from ..schemes.number_formats import SCALE_FORMATS
from . import allocations, entries, registry
from .cells import FULL_PRECISION, Cell
from .exactness import require_exact, require_one_router
from .options import Option


def check_cell(config: Mapping[str, Any], cell: Cell, where: str) -> None:
    """Reject an invalid cell or one that does not fit its model; the message names valid values."""
    mitigation = entries.entry(config, "mitigations", cell.mitigation)["method"]
    method = registry.method("mitigations", mitigation, f"mitigations.{cell.mitigation}.method")
    sizes = entries.shape(config, cell.model)
    _check_transform(config, cell, sizes, where)
    paired = registry.is_paired(mitigation, entries.entry(config, "mitigations", cell.mitigation).get("base"))
    require_one_router(paired, sizes, cell, where)
    _check_width(method, sizes, cell, where)
    if (mitigation == "none") != (cell.format == FULL_PRECISION):
        known = sorted(entries.known_names(config, "mitigations") - {"none"})
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' with format '{cell.format}'; a quantized format takes one of "
            f"{', '.join(known)}, '{FULL_PRECISION}' takes 'none'"
        )
    if cell.format != FULL_PRECISION:
        _check_granularity(config, cell, sizes, where)
        if allocations.is_allocated(config, cell):
            allocations.check_cell(config, cell, where)
        _check_training(config, cell, method, where)
        _check_shared_scales(config, cell, method, where)


def _check_transform(config: Mapping[str, Any], cell: Cell, sizes: ModelShape, where: str) -> None:
    """Reject a transform if the Hadamard matrix or Kronecker product that it needs does not exist,
    or if its blocks do not divide a site."""
    given = {
        key: value for key, value in entries.entry(config, "transforms", cell.transform).items() if key != "calibration"
    }
    transform = registry.method("transforms", given["method"], f"transforms.{cell.transform}.method")
    options = transform.resolve(given, f"transforms.{cell.transform}")["options"]
    require_exact(transform, options, sizes, cell.transform, where)
    for size, width in _widths(transform.hadamard_sizes(options), sizes):
        if not is_reachable(width):
            raise ConfigError(
                f"{where}: transform '{cell.transform}' needs a Hadamard matrix of order {width} "
                f"({size} of model '{cell.model}'), which no supported construction reaches; "
                f"use {transform.instead} for this model"
            )
    if transform.is_fitted_to_scheme(options) and "linears" in entries.resolved_schemes(config, cell):
        raise ConfigError(
            f"{where}: transform '{cell.transform}' is fitted to every linear being rounded, format "
            f"'{cell.format}' rounds some "
            "(linears); use a transform that is not fitted to a scheme, such as 'none', 'scaling' or 'random_hadamard'"
        )
    for size, width in _widths(transform.kronecker, sizes):
        if not has_kronecker_sizes(width):
            raise ConfigError(
                f"{where}: transform '{cell.transform}' splits {size} of model '{cell.model}' into a "
                "Kronecker product, and "
                f"{width} = 2 mod 4 has no such split; use 'optimized_scaling' or "
                "'optimized_rotation' for this model"
            )
    block = options[transform.block] if transform.block else 1
    sites = transform.block_sites or options.get("sites", ())
    for site, width in _inputs(sites, sizes):
        if width % block:
            fitting = [
                n
                for n in _fitting(transform.options[transform.block])
                if all(found % n == 0 for _, found in _inputs(sites, sizes))
            ]
            raise ConfigError(
                f"{where}: blocks of {block} of transform '{cell.transform}' do not divide the "
                f"{width} inputs of "
                f"site '{site}' of model '{cell.model}'; values of {transform.block} that fit its sites: "
                f"{', '.join(map(str, fitting)) or 'none, use ' + transform.instead}"
            )


def _widths(names: Iterable[str], sizes: ModelShape) -> Iterator[tuple[str, int]]:
    return ((name, width) for name in names for width in sizes.widths(name))


def _inputs(sites: Iterable[str], sizes: ModelShape) -> Iterator[tuple[str, int]]:
    return ((site, width) for site in sites for width in sizes.site_sizes(site))


def _fitting(option: Option) -> tuple[int, ...]:
    """List the block sizes to propose: those that the option accepts, or common ones."""
    return option.choices or (16, 24, 32, 48, 64, 96, 128, 192, 256)


def _check_training(config: Mapping[str, Any], cell: Cell, method: registry.Method, where: str) -> None:
    """Reject a trained mitigation without rounded weights, with only some linears rounded, or with
    fixed codes under power-of-two scales."""
    found = entries.resolved_schemes(config, cell)
    weight = found["weight"]
    if method.training and weight is None:
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' trains the rounding of weights, and format "
            f"'{cell.format}' leaves them in full "
            "precision; use a format that rounds them, such as 'int4', or 'rtn' with this one"
        )
    if method.training and "linears" in found:
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' trains with every linear rounded, format '{cell.format}' "
            "rounds some (linears); "
            "use a mitigation that does not train, such as 'gptq', with this one"
        )
    given = {
        key: value
        for key, value in entries.entry(config, "mitigations", cell.mitigation).items()
        if key not in ("calibration", "seeds")
    }
    options = method.resolve(given, f"mitigations.{cell.mitigation}")["options"]
    if method.needs_fine_scales(options) and SCALE_FORMATS[weight["scale_format"]].kind == "exponent":
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' keeps the codes of '{options['base']}' and trains "
            "their scales, and those of "
            f"format '{cell.format}' are powers of two, too coarse to train; use 'base: rtn', or "
            "another format such as 'nvfp4'"
        )


def _check_shared_scales(config: Mapping[str, Any], cell: Cell, method: registry.Method, where: str) -> None:
    """Reject a mitigation that computes the global scale of every linear by itself under a format
    that shares it by site."""
    shared = any(weight["global_scale"] == "site" for weight in _weights(entries.resolved_schemes(config, cell)))
    if shared and not method.shares_scales:
        sharing = ", ".join(name for name, other in registry.METHODS["mitigations"].items() if other.shares_scales)
        raise ConfigError(
            f"{where}: format '{cell.format}' shares a global scale among the linears of a site (global_scale: site), "
            f"and mitigation '{cell.mitigation}' does not; mitigations that do: {sharing}"
        )


def _check_width(method: registry.Method, sizes: ModelShape, cell: Cell, where: str) -> None:
    widest = max(width for _, width in _inputs(SITES, sizes))
    if method.widest_input is not None and widest > method.widest_input:
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' takes linears of at most {method.widest_input} inputs, "
            f"model '{cell.model}' has "
            f"{widest}; use 'low_rank' or 'gptq_low_rank' for this model"
        )


def _check_granularity(config: Mapping[str, Any], cell: Cell, sizes: ModelShape, where: str) -> None:
    allocated = allocations.is_allocated(config, cell)
    block = None if allocated else schemes.PRESETS[entries.preset(config, cell.format)]["block"]
    if block and cell.granularity != (own := str(Granularity.of_block(block))):
        raise ConfigError(
            f"{where}: format '{cell.format}' has blocks of {block} by definition, so granularity '{cell.granularity}' "
            f"contradicts it; use '{own}' or 'native', or exclude the pair"
        )
    found = entries.resolved_schemes(config, cell)
    for tensor, site, group in _groups(found):
        if wrong := next((width for width in sizes.site_sizes(site) if width % group), None):
            fitting = [
                size
                for size in (16, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
                if all(width % size == 0 for _, width in _inputs(SITES, sizes))
            ]
            of_axis = cell.granularity == str(Granularity.of_block(group))
            named = (
                f"granularity '{cell.granularity}'"
                if of_axis
                else f"group size {group} of formats.{cell.format}.{tensor}"
            )
            raise ConfigError(
                f"{where}: {named} does not divide the {wrong} inputs of site '{site}' "
                f"of model '{cell.model}'; "
                f"group sizes that fit all its sites: {', '.join(map(str, fitting)) or 'none'}"
            )
    if found["key_value"]:
        check_key_value(found["key_value"], sizes, f"{where}: formats.{cell.format}.key_value on model '{cell.model}'")


def _weights(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Schemes that weights of a cell may have."""
    return [found["weight"]] if found["weight"] else [*found.get("candidates", {}).values()]


def _groups(found: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield (tensor, site, group size) of every grouped scheme of weights and activations."""
    read = [site for site, linears in SITES.items() if {*linears} & {*found.get("linears", linears)}]
    of_site = {
        "weight": dict.fromkeys(read, _weights(found)),
        "activation": found["activation"],
    }
    yield from (
        (tensor, site, scheme["group_size"])
        for tensor, sites in of_site.items()
        for site, candidates in sites.items()
        for scheme in candidates
        if scheme["group_size"]
    )


def check_key_value(found: Mapping[str, Any], sizes: ModelShape, where: str) -> None:
    """Raise :class:`ConfigError` if groups or a rotation do not fit the heads of keys or values."""
    group = found["scheme"]["group_size"]
    for channels in (sizes.key_dim, sizes.head_dim):
        if group and channels % group:
            raise ConfigError(f"{where}: group size {group} does not divide the {channels} channels of a head")
    if found["rotate_keys"] and not is_reachable(sizes.key_dim):
        raise ConfigError(
            f"{where}: rotate_keys needs a Hadamard matrix of order {sizes.key_dim} (size of a head of keys), which "
            "no supported construction reaches"
        )
