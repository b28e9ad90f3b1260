"""From a canonical model to packed codes: transform folded in, every linear through its mitigation, errors measured on the way.

Layers of a model have the same shapes, so as many as fit in ``BUDGET`` bytes are solved in one call. Nothing here runs the model:
all a mitigation needs are the transformed weight and the transformed statistics of its site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activations import choose
from .allocator import LARGE, layer_bytes
from .architecture import LINEARS, SITE_OF, SITES, layer_tensors
from .calibration import site_name
from .cell_schemes import CellSchemes
from .checkpoints import CheckpointContent, bare_name
from .decoders import DecoderFolder, DecoderLayer
from .layer_errors import Roundings, Site, accounted_bits, measure, ratio
from .mitigations.compensated import Compensated
from .quantizer import QuantScheme
from .statistics import SiteStatistics
from .transform_costs import transform_costs
from .transforms.composition import Transform, folded_ends, layer_state

BUDGET = LARGE  # bytes of weights and second moments (float64) held at a time
Mitigation = Callable[[Tensor, SiteStatistics, QuantScheme], Compensated]


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear: transformed, then rounded by ``mitigation`` (None where weights are not rounded)."""

    transform: Transform
    schemes: CellSchemes
    mitigation: Mitigation | None
    statistics: str | None


@dataclass
class Quantized:
    """The checkpoint's content; per linear (``0.q``) its error measures and its bits; per site (``layers.0.down_input``) that had a choice
    of elements, the one chosen and the error of each on the token sample."""

    content: CheckpointContent
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Means over all linears, and the costs of the transform, whose bits are part of the stored bits."""
        found = {**summarize(self.errors), **self.costs}
        return {**found, "stored_bits": found["stored_bits"] + found["added_bits"]}


def chunks(decoder: DecoderFolder) -> list[range]:
    """Layer indices in groups whose weights and second moments stay within ``BUDGET``."""
    layers, size = decoder.shape.layers, max(1, BUDGET // layer_bytes(decoder.shape))
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def quantize_decoder(decoder: DecoderFolder, recipe: Recipe, progress: Callable[[Iterable], Iterable] = iter,
                     packed: MutableMapping[str, Tensor] | None = None) -> Quantized:
    """Quantize every linear of ``decoder``; embedding, lm_head, norms and biases stay in 16 or 32 bits.

    ``packed`` takes what the checkpoint will hold as it arises: a ``tensor_files.TensorSpool``, so that memory holds none of it; by default a dict.
    """
    result = Quantized(CheckpointContent(decoder.config, recipe.schemes, tensors={} if packed is None else packed))
    groups = chunks(decoder)
    work = [(group, linear) for group in groups for linear in LINEARS]
    layers: list[DecoderLayer] = []
    roundings: list[Roundings] = []
    site: Site | None = None
    for group, linear in progress(work):
        if linear == LINEARS[0]:
            layers, site = [], None  # let go of before the next ones are read
            layers = list(transformed(decoder, recipe, group))
            roundings = [add_layer(result, layer, recipe.schemes.activation) for layer in layers]
        if linear == SITES[SITE_OF[linear]][0]:
            site = None
        if recipe.schemes.weight is None or linear not in recipe.schemes.linears:
            keep_linear(result, layers, linear)
            continue
        site = site or Site.of(layers, roundings, SITE_OF[linear])
        quantize_linear(result, recipe, layers, linear, site)
    layers, site = [], None
    result.content.add_ends(folded_ends(recipe.transform, decoder, torch.bfloat16))
    result.costs = transform_costs(result.content, decoder)
    return result


def transformed(decoder: DecoderFolder, recipe: Recipe, group: range) -> Iterator[DecoderLayer]:
    """The layers of ``group`` one by one, with their statistics, as the transform leaves them."""
    for index in group:
        layer = layer_state(decoder, index, recipe.statistics)
        recipe.transform.fold_layer(layer)
        yield layer


def add_layer(result: Quantized, layer: DecoderLayer, activation: Mapping[str, Sequence[QuantScheme]]) -> Roundings:
    """What is not a linear's weight: norms, biases, online operations, and how the inputs of the sites are rounded, which is returned."""
    names = layer_tensors(layer.shape.architecture, layer.index)
    result.content.add_plain({names[role]: tensor for role, tensor in layer.weights.items() if role not in LINEARS})
    roundings: Roundings = {}
    for site, online in layer.online.items():
        if candidates := activation.get(site):
            roundings[site], errors = choose(candidates, layer.statistics[site], layer.input_clips.get(site))
            if errors:
                result.choices[site_name(layer.index, site)] = {"element": roundings[site].scheme.element, "input_error": errors}
        result.content.add_site(layer.index, site, online, roundings.get(site))
    return roundings


def _stacked(layers: list[DecoderLayer], linear: str) -> tuple[Tensor, list[str], list[str]]:
    """Weight (layers, m, n) in float32, names in the checkpoint and keys in the result of one linear of all layers."""
    weight = torch.stack([layer.weights[linear].float() for layer in layers])
    return weight, [bare_name(layer.index, linear) for layer in layers], [f"{layer.index}.{linear}" for layer in layers]


def keep_linear(result: Quantized, layers: list[DecoderLayer], linear: str) -> None:
    """One linear left in bfloat16, with the error of that."""
    weight, names, keys = _stacked(layers, linear)
    result.content.add_plain({f"{name}.weight": w for name, w in zip(names, weight)}, torch.bfloat16)
    errors = [ratio((w - w.bfloat16().float()).square().sum(), w.square().sum()) for w in weight]
    result.errors |= {key: {"bits": 16.0, "stored_bits": 16.0, "size": weight[0].numel(), "weight_error": error} for key, error in zip(keys, errors)}


def quantize_linear(result: Quantized, recipe: Recipe, layers: list[DecoderLayer], linear: str, site: Site,
                    statistics: SiteStatistics | None = None) -> Compensated:
    """One linear of all ``layers`` at once: (layers, m, n) through the mitigation, into the checkpoint, errors beside it.

    The mitigation sees ``statistics``, by default those of ``site``, on which the errors are measured in any case.
    """
    weight, names, keys = _stacked(layers, linear)
    clipped = torch.stack([layer.clips[linear](w) if linear in layer.clips else w for layer, w in zip(layers, weight)])
    solved = recipe.mitigation(clipped, site.statistics if statistics is None else statistics, recipe.schemes.weight)
    result.content.add_linear(names, solved)
    result.details |= {key: {name: values[i] for name, values in solved.details.items()} for i, key in enumerate(keys)}
    measures, bits = measure(weight, solved, site), accounted_bits(solved, recipe.schemes.weight)
    result.errors |= {key: {**{name: values[i] for name, values in measures.items()}, **bits, "size": weight[0].numel()}
                      for i, key in enumerate(keys)}
    return solved


def decibel(error: float) -> float | None:
    """Signal-to-error ratio in dB of a relative squared error; None where there is no error."""
    return -10 * math.log10(error) if error > 0 else None


def summarize(errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """Over all linears: size-weighted bits of the linears alone, and mean signal-to-error ratios in dB."""
    total = sum(entry["size"] for entry in errors.values())
    summary = {name: sum(entry[name] * entry["size"] for entry in errors.values()) / total for name in ("bits", "stored_bits")}
    for name in ("weight_error", "output_error", "joint_output_error"):
        ratios = [decibel(entry[name]) for entry in errors.values() if entry.get(name)]
        if ratios:
            summary[name.replace("_error", "_sqnr_db")] = sum(ratios) / len(ratios)
    return summary
