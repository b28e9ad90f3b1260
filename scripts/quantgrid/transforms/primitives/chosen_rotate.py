"""Primitives: rotations R2 and R4 only where they lower the error of rounded outputs.

RoSTE (arXiv 2502.09003) chooses rotations by the quantization error; its rule during training could
not be read, so this is its form for fixed weights. A site is rotated if the output error of its linears
on the token sample falls, inputs and weights rounded to nearest under the schemes of the cell. R2 turns
the rows of v too, whose output error is added. Ties keep the site as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer, LaterStatistics
from ...inference.activations import choose
from ...inference.transform import Parameters, Primitive
from ...models.plans import kind_of
from ...quantizer.tensors import fake_quantize
from ...schemes.cell_schemes import CellSchemes
from .rotate import RotateHeads, rotate_online

HADAMARD = {"operation": "hadamard"}


def rounded_error(layer: DecoderLayer, linears: Iterable[str], schemes: CellSchemes) -> float:
    """Sum over ``linears`` of |Q(x) Q(W)ᵀ - x Wᵀ|² / |x Wᵀ|² on the token sample of their site."""
    total = 0.0
    for linear in linears:
        site = layer.plan.site_of[linear]
        statistics, weight = layer.statistics[site], layer.weights[linear].float()
        x, candidates = statistics.samples.float(), schemes.activation.get(kind_of(site), ())
        rounded = choose(candidates, statistics, layer.input_clips.get(site))[0](x) if candidates else x
        used = weight if schemes.weight is None else fake_quantize(weight, schemes.weight.separate)
        wanted = (x @ weight.mT).double()
        whole = wanted.square().sum().item()
        total += ((rounded @ used.mT).double() - wanted).square().sum().item() / whole if whole > 0 else 0.0
    return total


def copied(layer: DecoderLayer) -> DecoderLayer:
    """Copy of ``layer`` with new maps, so that folding leaves the original as it is; tensors are shared."""
    made = copy(layer)
    for name in ("weights", "statistics"):
        setattr(made, name, copy(getattr(layer, name)))
    made.online = {site: list(operations) for site, operations in layer.online.items()}
    if isinstance(made.statistics, LaterStatistics):
        made.statistics.changes = {site: list(changes) for site, changes in made.statistics.changes.items()}
    return made


def chosen(
    layer: DecoderLayer, linears: list[str], schemes: CellSchemes, fold: Callable[[DecoderLayer], None]
) -> Parameters:
    """``chosen``, [1] if ``fold`` lowers the error of ``linears``, else [0], and ``errors``, [without it, with
    it]."""
    rotated = copied(layer)
    fold(rotated)
    errors = [rounded_error(state, linears, schemes) for state in (layer, rotated)]
    return {
        "chosen": torch.tensor([float(errors[1] < errors[0])], dtype=torch.float64),
        "errors": torch.tensor(errors, dtype=torch.float64),
    }


@dataclass
class ChosenHeads(RotateHeads):
    """R2 in the layers in which it lowers the output error of v and o, or of o alone where v cannot take it,
    under ``schemes``, which are used in the fit only."""

    schemes: InitVar[CellSchemes | None] = None
    reads_layer = True

    def __post_init__(self, schemes: CellSchemes | None) -> None:
        self.cell = schemes

    def fit_layer(self, layer: DecoderLayer) -> Parameters:
        rotation = super().fit_layer(layer)
        fold = super().fold_layer
        (site,) = layer.plan.sites_of(["output_input"])
        read = layer.plan.sites[site]
        turned = [read.source, *read.linears] if read.turns and read.source else list(read.linears)
        return rotation | chosen(layer, turned, self.cell, lambda state: fold(state, rotation))

    def fold_layer(self, layer: DecoderLayer, parameters: Parameters) -> None:
        if parameters["chosen"].item():
            rotation = {name: tensor for name, tensor in parameters.items() if name not in ("chosen", "errors")}
            super().fold_layer(layer, rotation)


@dataclass
class ChosenDown(Primitive):
    """R4 at the inputs of down projections whose output error it lowers under ``schemes``, which are used in
    the fit only."""

    schemes: InitVar[CellSchemes | None] = None
    reads_layer = True

    def __post_init__(self, schemes: CellSchemes | None) -> None:
        self.cell = schemes

    def fit_layer(self, layer: DecoderLayer) -> Parameters:
        found: dict[str, Tensor] = {}
        for site in layer.plan.sites_of(["down_input"]):
            linears = list(layer.plan.sites[site].linears)
            tried = chosen(layer, linears, self.cell, lambda state, site=site: rotate_online(state, site, HADAMARD))
            found |= {f"{site}.{name}": tensor for name, tensor in tried.items()}
        return found

    def fold_layer(self, layer: DecoderLayer, parameters: Parameters) -> None:
        for site in layer.plan.sites_of(["down_input"]):
            if parameters[f"{site}.chosen"].item():
                rotate_online(layer, site, HADAMARD)
