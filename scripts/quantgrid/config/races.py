"""Races of a config: their settings, their candidates, and mistakes in them. Standard library only.

A study with ``race`` evaluates the cells within a budget of stored bits on more and more windows of
a text of the race; only those that are not worse than the best are evaluated by the study.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from ..machine.chunks import windows_per_batch
from ..models.plans import kind_of
from ..schemes.cell_schemes import CellSchemes
from ..schemes.number_formats import ELEMENT_FORMATS
from . import allocations, entries, registry
from .cells import Cell

DEFAULTS = {"metric": "kl_divergence", "alpha": 0.05, "close": 0.05, "first": 8}
LOOKS = 6  # most looks of a race
TOKENS = 1000  # fewest tokens of the first look
FULL = 16  # bits of a weight or an activation that is not rounded
_TEXT = ("source", "part", "path", "id", "name", "split", "field")  # keys that determine the text
_CUT = ("window", "selection", "add_bos", "join", "render", "documents")  # keys that determine the order of its windows


def race_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a race."""
    return {**DEFAULTS, **given}


def candidates(config: Mapping[str, Any], wanted: Mapping[str, Any], cells: Iterable[Cell], where: str) -> list[Cell]:
    """List the quantized ``cells`` within the budget and of the deployment kind of a race.

    The bits are those of the weights, before factors, outliers and matrices of a method: these are
    known once a cell is quantized, and a race drops a cell that they lead beyond the budget.
    Raises :class:`ConfigError` if a model has fewer than two candidates.
    """
    quantized = [cell for cell in cells if cell.quantized]
    found = [cell for cell in quantized if is_within(planned_bits(config, cell), wanted["budget"])]
    if "kind" in wanted:
        found = [cell for cell in found if deployment_kind(config, cell) == wanted["kind"]]
    for model in dict.fromkeys(cell.model for cell in quantized):
        if sum(cell.model == model for cell in found) < 2:
            raise ConfigError(f"{where}: {_too_few(config, wanted, [c for c in quantized if c.model == model])}")
    if "prune" in wanted and not predictors(config, found):
        raise ConfigError(
            f"{where}.prune: cells whose mitigation reads no statistics predict the errors of others of the same "
            "transform, granularity and format, and there are none; add 'rtn' to the mitigations, or leave 'prune' out"
        )
    return found


def predictors(config: Mapping[str, Any], cells: Sequence[Cell]) -> dict[Cell, Cell]:
    """Map each of ``cells`` whose mitigation reads statistics to the one that predicts its error:
    the first of the same model, transform, granularity and format whose mitigation reads none."""
    methods = {name: entries.entry(config, "mitigations", name)["method"] for name in {c.mitigation for c in cells}}
    fitted = {name for name, method in methods.items() if registry.method("mitigations", method).reads_statistics}
    plain: dict[Cell, Cell] = {}
    for cell in (cell for cell in cells if cell.mitigation not in fitted):
        plain.setdefault(replace(cell, mitigation=""), cell)
    found = {cell: plain.get(replace(cell, mitigation="")) for cell in cells if cell.mitigation in fitted}
    return {cell: other for cell, other in found.items() if other}


def is_within(bits: float, budget: float) -> bool:
    """Check whether stored bits per weight, to two decimals, are within a budget: one global scale per
    tensor does not put NVFP4 beyond 4.5."""
    return round(bits, 2) <= budget


def _too_few(config: Mapping[str, Any], wanted: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Message for a model with fewer than two candidates among its ``cells``."""
    least = min(planned_bits(config, cell) for cell in cells)
    kinds = ", ".join(sorted({deployment_kind(config, cell) for cell in cells}))
    asked = f"at most {wanted['budget']:g} stored bits" + (f" and kind {wanted['kind']}" if "kind" in wanted else "")
    return (
        f"a race needs two candidates, and model '{cells[0].model}' has fewer cells of {asked}; the smallest of its "
        f"{len(cells)} cells has {least:.4g} bits, and their kinds are {kinds}"
    )


def planned_bits(config: Mapping[str, Any], cell: Cell) -> float:
    """Stored bits per weight of a cell's linears, codes and parameters of the scheme alone; of an
    allocation its budget, or the bits of its largest candidate without one."""
    if allocations.is_allocated(config, cell):
        return allocations.most_bits(config, cell)
    found, shape = CellSchemes.from_dict(entries.resolved_schemes(config, cell)), entries.shape(config, cell.model)
    total = bits = 0.0
    for plan, count in shape.plans():
        for linear in plan.linears:
            size = shape.linear_size(linear)
            rounded = found.weight is not None and kind_of(linear) in found.linears
            each = found.weight.bits_per_element(size) if rounded and found.weight else FULL
            total, bits = total + count * math.prod(size), bits + count * math.prod(size) * each
    return bits / total


def deployment_kind(config: Mapping[str, Any], cell: Cell) -> str:
    """Deployment kind of a cell: bits of its weights and of its widest rounded activations, such as
    ``w4a16`` (activations not rounded) and ``w4a4``."""
    schemes = CellSchemes.from_dict(entries.resolved_schemes(config, cell))
    weight = schemes.weight.element_format.bits if schemes.weight else FULL
    if allocations.is_allocated(config, cell):
        weight = int(allocations.most_bits(config, cell))
    elements = [scheme.element for site in schemes.activation.values() for scheme in site]
    return f"w{weight}a{max((ELEMENT_FORMATS[element].bits for element in elements), default=FULL)}"


def race_mistakes(config: Mapping[str, Any], study: str, asked: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """List mistakes in the race of a study that evaluates ``asked``."""
    wanted, where = config["studies"][study]["race"], f"studies.{study}.race"
    if wanted["windows"] not in config["corpora"]:
        yield f"{where}.windows: {unknown_name('corpus', wanted['windows'], config['corpora'])}"
        return
    corpus, name = config["corpora"][wanted["windows"]], wanted["windows"]
    batch = windows_per_batch(config["evaluation"]["batch_size"])
    first = math.ceil(wanted["first"] / batch) * batch
    if "windows" not in corpus:
        yield f"corpora.{name}.windows: a race needs the number of its windows before it starts; set it, such as to 128"
    elif corpus["windows"] < first:
        yield f"corpora.{name}.windows: {corpus['windows']} windows, and the first look takes {first}"
    elif corpus["windows"] > first * 2 ** (LOOKS - 1):
        yield (
            f"{where}.first: {first} windows, doubled {LOOKS - 1} times, are {first * 2 ** (LOOKS - 1)}, and corpus "
            f"'{name}' has {corpus['windows']}; a race has at most {LOOKS} looks: start with more, or use fewer windows"
        )
    if first * corpus["window"] < TOKENS:
        yield (
            f"{where}.first: the first look has {first} windows of {corpus['window']} tokens; at least "
            f"{TOKENS} tokens are accepted"
        )
    for evaluated in asked["perplexity"]:
        if evaluated in config["corpora"] and not _apart(config["corpora"][evaluated], corpus):
            yield (
                f"{where}.windows: '{name}' shares windows with '{evaluated}', on which the study evaluates; name "
                "another text, or the same corpus with skip_windows of at least the number of its windows"
            )


def _apart(evaluated: Mapping[str, Any], raced: Mapping[str, Any]) -> bool:
    """Check whether two corpora share no window: other texts, or windows of one text behind those
    of the other."""
    if any(evaluated.get(key) != raced.get(key) for key in _TEXT):
        return True
    if any(evaluated.get(key) != raced.get(key) for key in _CUT):
        return False
    begin, behind = (entry.get("skip_windows", 0) for entry in (evaluated, raced))
    return behind >= begin + evaluated.get("windows", math.inf) or begin >= behind + raced.get("windows", math.inf)
