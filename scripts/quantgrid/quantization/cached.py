"""Quantization with cached statistics: fold in the transform, quantize every linear, measure
errors.

All layers of a model have the same shapes, so one call solves as many layers as fit in the budget of
the decoder's placement; a GPU that runs out of memory gets half of them. The model itself never runs: a
mitigation needs only the transformed weight and the transformed statistics of its site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calibration.accumulators import site_name
from ..calibration.experts import expert_tokens
from ..calibration.layers import DecoderFolder, DecoderLayer
from ..calibration.statistics import SiteStatistics
from ..inference.activations import choose
from ..inference.transform import Transform, folded_ends, layer_state
from ..machine.devices import in_smaller_parts
from ..models.plans import kind_of, linear_key
from ..models.shapes import layer_tensors, module_name
from ..quantizer.quantized_weight import Compensated
from ..schemes.cell_schemes import CellSchemes
from ..schemes.quant_scheme import QuantScheme
from .checkpoints import CheckpointContent
from .grouping import batches, chunks
from .layer_errors import Roundings, Site, accounted_bits, measure, ratio
from .shared_scales import clipped_weight, shared_global_scales
from .transform_costs import transform_costs

Mitigation = Callable[..., Compensated]  # of a weight, the statistics of its site and a scheme


@dataclass(frozen=True)
class Recipe:
    """Treatment of every linear: transform, then ``mitigation`` (None where weights are not
    rounded)."""

    transform: Transform
    schemes: CellSchemes
    mitigation: Mitigation | None
    statistics_file: str | None


@dataclass
class Quantized:
    """Content of the checkpoint with error measures and bits per linear (``0.q``).

    For each site with a choice of elements (``layers.0.down_input``) it also holds the chosen
    element and the error of each candidate on the token sample.
    """

    content: CheckpointContent
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def finish(self, decoder: DecoderFolder, statistics: str | None) -> None:
        """Add the costs of the transform, and the calibration tokens of experts in the file ``statistics``."""
        self.costs = {**transform_costs(self.content, decoder), **expert_tokens(decoder.shape, statistics)}

    def summary(self) -> dict[str, float]:
        """Means over all linears, and the ``costs``; ``stored_bits`` includes the bits of the transform."""
        found = {**summarize(self.errors), **self.costs}
        return {**found, "stored_bits": found["stored_bits"] + found["added_bits"]}


def quantize_decoder(
    decoder: DecoderFolder,
    recipe: Recipe,
    progress: Callable[[Iterable], Iterable] = iter,
    packed: MutableMapping[str, Tensor] | None = None,
) -> Quantized:
    """Quantize every linear of ``decoder``; embedding, lm_head, norms and biases keep 16 or 32
    bits.

    ``packed`` collects the tensors of the checkpoint as they are computed. Pass a
    ``tensor_files.TensorSpool`` to keep them out of memory; the default is a dict.
    """
    result = Quantized(CheckpointContent(decoder.config, recipe.schemes, tensors={} if packed is None else packed))
    shape, budget = decoder.shape, decoder.placement.budget()
    work = [(group, names) for group in chunks(shape, budget) for names in batches(shape, group, budget)]
    held, parts, begun = _Group(result, decoder, recipe), [], None
    for group, names in progress(work):
        if group is not begun:
            parts, begun = [group], group
        parts = in_smaller_parts(parts, partial(held.quantize, names))
    held.free()
    result.content.add_ends(folded_ends(recipe.transform, decoder, torch.bfloat16))
    result.finish(decoder, recipe.statistics_file)
    return result


class _Group:
    """Transformed layers that are solved together, and the inputs of the linears that are solved next."""

    def __init__(self, result: Quantized, decoder: DecoderFolder, recipe: Recipe):
        self.result, self.decoder, self.recipe = result, decoder, recipe
        self.free()

    def free(self) -> None:
        """Free the layers and their inputs."""
        self.held: range | None = None
        self.layers: list[DecoderLayer] = []
        self.roundings: list[Roundings] = []
        self.site: Site | None = None
        self.read: list[tuple[int, str]] = []

    def _load(self, part: range) -> None:
        """Read the layers ``part``, unless they are held; the previous ones are freed first."""
        if part == self.held:
            return
        self.free()
        self.layers = list(transformed(self.decoder, self.recipe, part))
        self.roundings = [add_layer(self.result, layer, self.recipe.schemes.activation) for layer in self.layers]
        self.held = part

    def quantize(self, names: Sequence[str], part: range) -> None:
        """Quantize the linears ``names`` of the layers ``part``; nothing is held after an error."""
        try:
            self._load(part)
            self._solve(names)
        except BaseException:
            self.free()
            raise

    def _solve(self, names: Sequence[str]) -> None:
        schemes, first = self.recipe.schemes, self.layers[0].index
        for targets in by_scheme([(layer, name) for layer in self.layers for name in names], schemes):
            if scheme_of(targets, schemes) is None:
                keep_linears(self.result, targets)
                continue
            wanted = [(layer.index, layer.plan.site_of[name]) for layer, name in targets]
            if self.read != wanted:
                self.site, self.read = None, wanted  # free the previous site before making the next
            sites = [(self.layers[index - first], self.roundings[index - first], name) for index, name in wanted]
            self.site = self.site or Site.of(sites)
            quantize_linears(self.result, self.recipe, targets, self.site)


def transformed(decoder: DecoderFolder, recipe: Recipe, group: range) -> Iterator[DecoderLayer]:
    """Yield the transformed layers of ``group`` one by one, with their transformed statistics and
    shared global scales."""
    for index in group:
        layer = layer_state(decoder, index, recipe.statistics_file)
        recipe.transform.fold_layer(layer)
        layer.global_scales = shared_global_scales(layer, recipe.schemes)
        yield layer


def add_layer(result: Quantized, layer: DecoderLayer, activation: Mapping[str, Sequence[QuantScheme]]) -> Roundings:
    """Add norms, biases and online operations of ``layer`` to ``result``; return the rounding of
    each site input."""
    names, linears = layer_tensors(layer.shape, layer.index), layer.plan.linears
    result.content.add_plain({names[role]: tensor for role, tensor in layer.weights.items() if role not in linears})
    roundings: Roundings = {}
    for site, online in layer.online.items():
        if candidates := activation.get(kind_of(site)):
            roundings[site], errors = choose(candidates, layer.statistics[site], layer.input_clips.get(site))
            if errors:
                result.choices[site_name(layer.index, site)] = {
                    "element": roundings[site].scheme.element,
                    "input_error": errors,
                }
        result.content.add_site(layer.index, site, online, roundings.get(site))
    return roundings


Target = tuple[DecoderLayer, str]  # a linear of a layer


def by_scheme(targets: Sequence[Target], schemes: CellSchemes) -> list[list[Target]]:
    """Split ``targets`` by the scheme of their weights, in order of appearance."""
    found: dict[QuantScheme | None, list[Target]] = {}
    for layer, linear in targets:
        found.setdefault(schemes.weight_of(layer.index, linear), []).append((layer, linear))
    return list(found.values())


def scheme_of(targets: Sequence[Target], schemes: CellSchemes) -> QuantScheme | None:
    """Scheme of the weights of ``targets``, which have one."""
    layer, linear = targets[0]
    return schemes.weight_of(layer.index, linear)


def _stacked(targets: Sequence[Target]) -> tuple[Tensor, list[str], list[str]]:
    """Weights (targets, m, n) in float32, checkpoint names and result keys of linears of one shape."""
    weight = torch.stack([layer.weights[linear].float() for layer, linear in targets])
    names = [module_name(layer.shape, layer.index, linear) for layer, linear in targets]
    return weight, names, [linear_key(layer.index, linear) for layer, linear in targets]


def keep_linears(result: Quantized, targets: Sequence[Target]) -> None:
    """Keep linears of one shape in bfloat16 and record the resulting errors."""
    weight, names, keys = _stacked(targets)
    result.content.add_plain({f"{name}.weight": w for name, w in zip(names, weight)}, torch.bfloat16)
    errors = [ratio((w - w.bfloat16().float()).square().sum(), w.square().sum()) for w in weight]
    result.errors |= {
        key: {"bits": 16.0, "stored_bits": 16.0, "size": weight[0].numel(), "weight_error": error}
        for key, error in zip(keys, errors)
    }


def quantize_linears(
    result: Quantized,
    recipe: Recipe,
    targets: Sequence[Target],
    site: Site,
    statistics: SiteStatistics | None = None,
) -> Compensated:
    """Quantize linears of one shape and scheme at once, weights (targets, m, n), and record their errors.

    The mitigation uses ``statistics``, by default those of ``site``. Errors are always measured on
    ``site``.
    """
    weight, names, keys = _stacked(targets)
    clipped = torch.stack([clipped_weight(layer, linear) for layer, linear in targets])
    used, given = site.statistics if statistics is None else statistics, {}
    scheme, candidate = scheme_of(targets, recipe.schemes), recipe.schemes.chosen.get(keys[0], "")
    if scheme.global_scale == "site":
        given["global_scale"] = torch.stack([layer.global_scales[linear] for layer, linear in targets])
    solved = recipe.mitigation(clipped, used, scheme, **given)
    result.content.add_linear(names, solved, candidate)
    result.details |= {key: {name: values[i] for name, values in solved.details.items()} for i, key in enumerate(keys)}
    measures, bits = measure(weight, solved, site), accounted_bits(solved, scheme)
    result.errors |= {
        key: {**{name: values[i] for name, values in measures.items()}, **bits, "size": weight[0].numel()}
        for i, key in enumerate(keys)
    }
    return solved


def decibel(error: float) -> float | None:
    """Signal-to-error ratio in dB of a relative squared error; None for an error of 0."""
    return -10 * math.log10(error) if error > 0 else None


def summarize(errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """Summary over all linears: size-weighted bits per weight and mean signal-to-error ratios in
    dB."""
    total = sum(entry["size"] for entry in errors.values())
    summary = {
        name: sum(entry[name] * entry["size"] for entry in errors.values()) / total for name in ("bits", "stored_bits")
    }
    for name in ("weight_error", "output_error", "joint_output_error"):
        ratios = [decibel(entry[name]) for entry in errors.values() if entry.get(name)]
        if ratios:
            summary[name.replace("_error", "_sqnr_db")] = sum(ratios) / len(ratios)
    return summary
