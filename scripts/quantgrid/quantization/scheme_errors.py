"""Output errors of every linear under every candidate scheme of an allocation.

A linear is solved as in a cell of that scheme alone: with cached statistics, independently of what other
linears get. No checkpoint is written. A mitigation that is fitted to second moments underestimates its
error on them, so its errors are measured on ``held_out`` statistics of other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..calibration.layers import DecoderFolder, DecoderLayer
from ..calibration.statistics import stack
from ..models.plans import linear_key
from ..schemes.cell_schemes import CellSchemes
from .cached import Quantized, Recipe, add_layer, transformed
from .checkpoints import CheckpointContent
from .grouping import batches, chunks
from .layer_errors import Site, accounted_bits, measure
from .shared_scales import clipped_weight, shared_global_scales
from .transform_costs import transform_costs

Errors = dict[str, dict[str, Any]]


def scheme_errors(
    decoder: DecoderFolder,
    recipe: Recipe,
    held_out: str | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Errors and bits of every linear under the candidates of ``recipe.schemes``.

    ``linears``: linear (``0.q``) -> ``size``, number of weights, and ``schemes``: name -> ``output_error``
    (relative, on exact inputs, of the statistics file ``held_out`` or those of the recipe) and
    ``stored_bits`` per weight. ``added_bits`` per weight are those of the transform.
    """
    content = Quantized(CheckpointContent(decoder.config, recipe.schemes))
    other = recipe if held_out is None else replace(recipe, statistics_file=held_out)
    found: Errors = {}
    layers: list[DecoderLayer] = []
    measured: list[DecoderLayer] = []
    budget = decoder.placement.budget() // (1 if held_out is None else 2)  # two copies of a group
    for group in progress(chunks(decoder.shape, budget)):
        layers, measured = [], []  # free the previous group before reading the next
        layers = list(transformed(decoder, recipe, group))
        measured = layers if other is recipe else list(transformed(decoder, other, group))
        for layer in layers:
            add_layer(content, layer, {})
        for names in batches(decoder.shape, group, budget):
            found |= _of_linears(recipe, layers, measured, names)
    return {"linears": found, "added_bits": transform_costs(content.content, decoder)["added_bits"]}


def _of_linears(
    recipe: Recipe, layers: list[DecoderLayer], measured: list[DecoderLayer], names: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``0.q``, entry) of the linears ``names``, all of one shape, in all ``layers``.

    The mitigation reads the statistics of ``layers``, errors are those of ``measured``.
    """
    targets = [(number, name) for number in range(len(layers)) for name in names]
    weight = torch.stack([layers[number].weights[name].float() for number, name in targets])
    clipped = torch.stack([clipped_weight(layers[number], name) for number, name in targets])
    sites = [(number, layers[number].plan.site_of[name]) for number, name in targets]
    site = Site.of([(measured[number], {}, name) for number, name in sites])
    used = site.statistics
    if measured is not layers:
        used = stack([layers[number].statistics[name] for number, name in sites])
    entries: list[dict[str, Any]] = [{"size": weight[0].numel(), "schemes": {}} for _ in targets]
    for label, scheme in recipe.schemes.candidates.items():
        given = {}
        if scheme.global_scale == "site":
            alone = CellSchemes(scheme)
            scales = [shared_global_scales(layer, alone) for layer in layers]
            given["global_scale"] = torch.stack([scales[number][name] for number, name in targets])
        solved = recipe.mitigation(clipped, used, scheme, **given)
        errors, bits = measure(weight, solved, site)["output_error"], accounted_bits(solved, scheme)["stored_bits"]
        for entry, error in zip(entries, errors):
            entry["schemes"][label] = {"output_error": error, "stored_bits": bits}
    for (number, name), entry in zip(targets, entries):
        yield linear_key(layers[number].index, name), entry
