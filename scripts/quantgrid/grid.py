"""The grid: studies of a config expanded into cells, and the rules that say which cells exist.

A cell is one point (model, transform, mitigation, granularity, format). A study is a named sub-grid: the product of its axes,
plus the products under ``also`` (each states only the axes that differ), less what ``exclude`` matches, plus the full-precision
baseline of its models. Standard library only; nothing here reads a weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from . import registry, schemes
from .architecture import SITES, ModelShape
from .errors import ConfigError, unknown_name
from .granularities import cell_schemes, parse_granularity
from .hadamard_orders import is_reachable
from .kronecker_sizes import has_kronecker_sizes
from .model_shapes import shape_of

AXES = {"models": "model", "transforms": "transform", "mitigations": "mitigation", "granularities": "granularity", "formats": "format"}
FULL_PRECISION = "bf16"


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the grid; every value is the name of a config entry or of a preset."""

    model: str
    transform: str
    mitigation: str
    granularity: str
    format: str

    @property
    def axes(self) -> dict[str, str]:
        return asdict(self)

    @property
    def path(self) -> str:
        return "/".join(asdict(self).values())

    @property
    def quantized(self) -> bool:
        return self.mitigation != "none"


def baseline(model: str) -> Cell:
    """The full-precision cell of a model: the same for every study."""
    return Cell(model, "none", "none", "-", FULL_PRECISION)


def expand_studies(config: Mapping[str, Any]) -> list[Cell]:
    """All distinct cells of all studies, in the order in which studies name them."""
    cells = dict.fromkeys(cell for study in config["studies"] for cell in study_cells(config, study))
    return list(cells)


def study_cells(config: Mapping[str, Any], name: str) -> list[Cell]:
    """The distinct cells of one study, its baselines first; raises :class:`ConfigError` for a cell that cannot exist."""
    study = config["studies"][name]
    where = f"studies.{name}"
    blocks = [study, *({**study, **part} for part in study.get("also", []))]
    found: dict[Cell, None] = {}
    for block in blocks:
        for cell in _product(config, block, where):
            if not any(_matches(config, cell, pattern, where) for pattern in study.get("exclude", [])):
                found.setdefault(cell)
    if not found:
        raise ConfigError(f"{where}: no cell is left; give each of {', '.join(AXES)} at least one value that 'exclude' does not remove")
    for cell in found:
        check_cell(config, cell, where)
    return list(dict.fromkeys([*(baseline(model) for model in dict.fromkeys(cell.model for cell in found)), *found]))


def _product(config: Mapping[str, Any], block: Mapping[str, Any], where: str) -> Iterator[Cell]:
    names = [[name for given in block.get(axis, ()) for name in entry_names(config, axis, given, f"{where}.{axis}")] for axis in AXES]
    for values in product(*names):
        yield _settle(config, Cell(*values))


def names_in(study: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(axis, name, key below the study) of every name that a study gives: on its axes, under ``also`` and under ``exclude``."""
    for key, block in (("", study), *((f"also.{number}.", part) for number, part in enumerate(study.get("also", [])))):
        yield from ((axis, name, f"{key}{axis}") for axis in AXES for name in block.get(axis, ()))
    for number, pattern in enumerate(study.get("exclude", [])):
        for axis, singular in AXES.items():
            yield from ((axis, name, f"exclude.{number}.{singular}") for name in _listed(pattern.get(singular, [])))


def _listed(names: str | list[str]) -> list[str]:
    return names if isinstance(names, list) else [names]


def entry_names(config: Mapping[str, Any], axis: str, given: str, where: str) -> list[str]:
    """The names that ``given``, at the config key ``where``, stands for: itself, or one per seed where its entry lists ``seeds``."""
    names = expanded_names(config, axis, given)
    if names != [given]:
        return names
    if axis == "granularities":
        if given != "native":
            parse_granularity(given, where)
        return [given]
    known = known_names(config, axis)
    if given not in known:
        raise ConfigError(f"{where}: {unknown_name(AXES[axis], given, known)}")
    return [given]


def expanded_names(config: Mapping[str, Any], axis: str, given: str) -> list[str]:
    """The names of an entry: its own, or one per seed where it lists ``seeds``."""
    seeds = (config.get(axis, {}).get(given) or {}).get("seeds")
    return [given] if seeds is None else [f"{given}-s{seed}" for seed in seeds]


def known_names(config: Mapping[str, Any], axis: str) -> set[str]:
    """Names that a study may use on ``axis``: entries of the config, and what needs no entry."""
    builtin = {"formats": schemes.PRESETS, **registry.METHODS}.get(axis, ())
    return {*config.get(axis, {}), *builtin}


def asked(config: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a study evaluates: its own ``evaluate``, the config's where it says nothing."""
    return {**config["evaluate"], **study.get("evaluate", {})}


def without_note(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A config entry less what is there for readers, or for checks, only."""
    return {key: value for key, value in entry.items() if key not in ("note", "published")}


def entry(config: Mapping[str, Any], axis: str, name: str) -> dict[str, Any]:
    """The config entry behind a name; a method or preset used by its own name needs none, a seeded name gets its seed."""
    entries = config.get(axis, {})
    base, _, seed = name.rpartition("-s")
    if name not in entries and base in entries and name in expanded_names(config, axis, base):
        return {**{key: value for key, value in entries[base].items() if key != "seeds"}, "seed": int(seed)}
    if axis == "formats":
        return {"preset": name, **entries.get(name, {})}
    return dict(entries.get(name) or {"method": name})


def _settle(config: Mapping[str, Any], cell: Cell) -> Cell:
    """A full-precision format leaves nothing to mitigate; ``native`` is a format's own block, or one scale per channel."""
    if cell.format == FULL_PRECISION:
        return Cell(cell.model, cell.transform, "none", "-", cell.format)
    return replace(cell, granularity=_settled_granularity(config, cell.granularity, cell.format))


def _settled_granularity(config: Mapping[str, Any], granularity: str, format: str) -> str:
    if granularity != "native":
        return granularity
    block = schemes.PRESETS[_preset(config, format)]["block"]
    return f"group-{block}" if block else "channel"


def _preset(config: Mapping[str, Any], name: str) -> str:
    preset = entry(config, "formats", name)["preset"]
    if preset not in schemes.PRESETS:
        raise ConfigError(f"formats.{name}.preset: {unknown_name('preset', preset, schemes.PRESETS)}")
    return preset


def _matches(config: Mapping[str, Any], cell: Cell, pattern: Mapping[str, Any], where: str) -> bool:
    """Whether ``cell`` has, on every axis that ``pattern`` names, one of the values that it gives."""
    for key, wanted in pattern.items():
        axis = next(plural for plural, singular in AXES.items() if singular == key)
        values = [name for value in _listed(wanted) for name in entry_names(config, axis, value, f"{where}.exclude")]
        if axis == "granularities":
            values = [_settled_granularity(config, name, cell.format) for name in values]
        if getattr(cell, key) not in values:
            return False
    return True


def shape(config: Mapping[str, Any], model: str) -> ModelShape:
    """The shape that a model's config entry declares; a local folder is looked at once."""
    return _shape(model, json.dumps(config["models"][model]))


@cache
def _shape(name: str, entry: str) -> ModelShape:
    return shape_of(json.loads(entry), f"models.{name}")


def check_cell(config: Mapping[str, Any], cell: Cell, where: str) -> None:
    """Refuse a cell that contradicts itself or does not fit its model; the message says what would."""
    mitigation = entry(config, "mitigations", cell.mitigation)["method"]
    method = registry.method("mitigations", mitigation, f"mitigations.{cell.mitigation}.method")
    _check_transform(config, cell, shape(config, cell.model), where)
    _check_width(method, shape(config, cell.model), cell, where)
    if (mitigation == "none") != (cell.format == FULL_PRECISION):
        raise ConfigError(f"{where}: mitigation '{cell.mitigation}' with format '{cell.format}'; a quantized format takes one of "
                          f"{', '.join(sorted(set(known_names(config, 'mitigations')) - {'none'}))}, '{FULL_PRECISION}' takes 'none'")
    if cell.format != FULL_PRECISION:
        _check_granularity(config, cell, shape(config, cell.model), where)
        _check_training(config, cell, method, where)


def _check_transform(config: Mapping[str, Any], cell: Cell, sizes: ModelShape, where: str) -> None:
    """Refuse a transform that needs a Hadamard matrix or a Kronecker product that does not exist, or blocks that do not divide a site."""
    given = {key: value for key, value in entry(config, "transforms", cell.transform).items() if key != "calibration"}
    transform = registry.method("transforms", given["method"], f"transforms.{cell.transform}.method")
    options = transform.resolve(given, f"transforms.{cell.transform}")["options"]
    for size in transform.hadamard_sizes(options):
        if not is_reachable(getattr(sizes, size)):
            raise ConfigError(f"{where}: transform '{cell.transform}' needs a Hadamard matrix of order {getattr(sizes, size)} "
                              f"({size} of model '{cell.model}'), which no supported construction reaches; "
                              f"use {transform.instead} for this model")
    if transform.is_fitted_to_scheme(options) and "linears" in resolved_schemes(config, cell):
        raise ConfigError(f"{where}: transform '{cell.transform}' is fitted to every linear being rounded, format '{cell.format}' rounds some "
                          "(linears); use a transform that is not fitted to a scheme, such as 'none', 'scaling' or 'random_hadamard'")
    for size in transform.kronecker:
        if not has_kronecker_sizes(getattr(sizes, size)):
            raise ConfigError(f"{where}: transform '{cell.transform}' splits {size} of model '{cell.model}' into a Kronecker product, and "
                              f"{getattr(sizes, size)} = 2 mod 4 has no such split; use 'optimized_scaling' or 'optimized_rotation' for this model")
    block = options[transform.block] if transform.block else 1
    for site in options.get("sites", ()):
        if sizes.site_size(site) % block:
            fitting = [n for n in _fitting(transform.options[transform.block]) if all(sizes.site_size(s) % n == 0 for s in options["sites"])]
            raise ConfigError(f"{where}: blocks of {block} of transform '{cell.transform}' do not divide the {sizes.site_size(site)} inputs of "
                              f"site '{site}' of model '{cell.model}'; values of {transform.block} that fit its sites: "
                              f"{', '.join(map(str, fitting)) or 'none, use ' + transform.instead}")


def _fitting(option: registry.Option) -> tuple[int, ...]:
    """Block sizes to propose: those that an option takes, or the usual ones."""
    return option.choices or (16, 24, 32, 48, 64, 96, 128, 192, 256)


def _check_training(config: Mapping[str, Any], cell: Cell, method: registry.Method, where: str) -> None:
    """Refuse a mitigation that trains where it cannot: no rounded weights, some linears alone, or fixed codes under scales that cannot follow."""
    found = resolved_schemes(config, cell)
    weight = found["weight"]
    if method.training and weight is None:
        raise ConfigError(f"{where}: mitigation '{cell.mitigation}' trains the rounding of weights, and format '{cell.format}' leaves them in full "
                          "precision; use a format that rounds them, such as 'int4', or 'rtn' with this one")
    if method.training and "linears" in found:
        raise ConfigError(f"{where}: mitigation '{cell.mitigation}' trains with every linear rounded, format '{cell.format}' rounds some (linears); "
                          "use a mitigation that does not train, such as 'gptq', with this one")
    given = {key: value for key, value in entry(config, "mitigations", cell.mitigation).items() if key not in ("calibration", "seeds")}
    options = method.resolve(given, f"mitigations.{cell.mitigation}")["options"]
    if method.needs_fine_scales(options) and schemes.SCALE_FORMATS[weight["scale_format"]].kind == "exponent":
        raise ConfigError(f"{where}: mitigation '{cell.mitigation}' keeps the codes of '{options['base']}' and trains their scales, and those of "
                          f"format '{cell.format}' are powers of two, which only double or halve; use 'base: rtn', or another format such as 'nvfp4'")


def _check_width(method: registry.Method, sizes: ModelShape, cell: Cell, where: str) -> None:
    widest = max(sizes.site_size(site) for site in SITES)
    if method.widest_input is not None and widest > method.widest_input:
        raise ConfigError(f"{where}: mitigation '{cell.mitigation}' takes linears of at most {method.widest_input} inputs, model '{cell.model}' has "
                          f"{widest}; use 'low_rank' or 'gptq_low_rank' for this model")


def _check_granularity(config: Mapping[str, Any], cell: Cell, sizes: ModelShape, where: str) -> None:
    block = schemes.PRESETS[_preset(config, cell.format)]["block"]
    if block and cell.granularity != f"group-{block}":
        raise ConfigError(f"{where}: format '{cell.format}' has blocks of {block} by definition, so granularity '{cell.granularity}' "
                          f"contradicts it; use 'group-{block}' or 'native', or exclude the pair")
    found = resolved_schemes(config, cell)
    for tensor, site, group in _groups(found):
        if sizes.site_size(site) % group:
            fitting = [size for size in (16, 32, 48, 64, 96, 128, 192, 256, 512, 1024) if all(sizes.site_size(s) % size == 0 for s in SITES)]
            of_axis = cell.granularity == f"group-{group}"
            named = f"granularity '{cell.granularity}'" if of_axis else f"group size {group} of formats.{cell.format}.{tensor}"
            raise ConfigError(f"{where}: {named} does not divide the {sizes.site_size(site)} inputs of site '{site}' of model '{cell.model}'; "
                              f"group sizes that fit all its sites: {', '.join(map(str, fitting)) or 'none'}")
    if found["key_value"]:
        _check_key_value(found["key_value"], sizes.head_dim, f"{where}: formats.{cell.format}.key_value on model '{cell.model}'")


def _groups(found: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(tensor, site, group size) of every grouped scheme of weights and activations."""
    read = [site for site, linears in SITES.items() if {*linears} & {*found.get("linears", linears)}]
    of_site = {"weight": dict.fromkeys(read, [found["weight"]] if found["weight"] else []), "activation": found["activation"]}
    yield from ((tensor, site, scheme["group_size"]) for tensor, sites in of_site.items() for site, candidates in sites.items()
                for scheme in candidates if scheme["group_size"])


def _check_key_value(found: Mapping[str, Any], head_dim: int, where: str) -> None:
    group = found["scheme"]["group_size"]
    if group and head_dim % group:
        raise ConfigError(f"{where}: group size {group} does not divide the {head_dim} channels of a head")
    if found["rotate_keys"] and not is_reachable(head_dim):
        raise ConfigError(f"{where}: rotate_keys needs a Hadamard matrix of order {head_dim} (head_dim), which no supported construction reaches")


def resolved_schemes(config: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """What a cell rounds, as :func:`granularities.cell_schemes` gives it for its model, with every field of every scheme filled in."""
    if not cell.quantized:
        return {"weight": None, "activation": {}, "key_value": None}
    return _schemes(json.dumps(entry(config, "formats", cell.format)), cell.granularity, f"formats.{cell.format}", shape(config, cell.model).head_dim)


@cache
def _schemes(entry: str, granularity: str, where: str, head_dim: int) -> dict[str, Any]:
    return cell_schemes(json.loads(entry), granularity, where, head_dim)
