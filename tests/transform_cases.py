"""Recipes of transforms, tiny decoders with calibrations, and their folded form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quantgrid.calibration.layers import DecoderFolder, DecoderLayer
from quantgrid.inference.transform import Transform, fit, layer_state
from quantgrid.models.plans import END_ROLES, SITES
from quantgrid.models.shapes import layer_tensors
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.primitives.block_rotate import GreedyBlocks
from quantgrid.transforms.primitives.reorder import Reorder, Zigzag
from quantgrid.transforms.primitives.rotate import RotateDown, RotateHeads, RotateResidual
from quantgrid.transforms.primitives.scale import Scale
from quantgrid.transforms.recipes import (
    awq,
    block_hadamard,
    duquant,
    fold_norms,
    none,
    outlier_suppression_plus,
    perq,
    quarot,
    random_hadamard,
    random_orthogonal,
    reordering,
    rotation_then_scaling,
    scaling,
    shifting,
    wush,
)
from reference_statistics import run, statistics_of
from tiny_decoders import CASES, VARIED, Case

NORMS, ALL = ["attention_input", "mlp_input"], list(SITES)
INT4 = CellSchemes(scheme("int4"), {site: [activation_scheme("int4")] for site in SITES})
GROUPS = CellSchemes(
    scheme("int4", group_size=16), {site: [activation_scheme("int4", group_size=16)] for site in SITES}
)


RECIPES: dict[str, Callable[[], list]] = {
    "none": none.primitives,
    "norms folded": fold_norms.primitives,
    "smoothquant": lambda: scaling.primitives(0.5, NORMS),
    "scaling of all sites": lambda: scaling.primitives(0.7, ALL),
    "R1 hadamard": lambda: [RotateResidual("hadamard", 1)],
    "R1 orthogonal": lambda: [RotateResidual("orthogonal", 2)],
    "R2": lambda: [RotateHeads(3)],
    "R4": lambda: [RotateDown()],
    "random hadamard": lambda: random_hadamard.primitives(4),
    "scaling, then random hadamard": lambda: [*scaling.primitives(0.5, ALL), *random_hadamard.primitives(5)],
    "random hadamard, then scaling": lambda: [
        *random_hadamard.primitives(6),
        *scaling.primitives(0.5, [*NORMS, "output_input"]),
    ],
    "two rotations": lambda: [
        RotateResidual("orthogonal", 7),
        RotateHeads(8),
        RotateResidual("hadamard", 9),
        RotateHeads(10),
    ],
    "R4 twice": lambda: [
        RotateDown(),
        Scale(0.3, ["output_input"]),
        RotateHeads(11),
        Scale(0.6, ["output_input"]),
        RotateDown(),
    ],
    "shifting": lambda: shifting.primitives("midrange", ALL),
    "shifting by the mean": lambda: shifting.primitives("mean", ALL),
    "searched scaling": lambda: scaling.primitives(0.5, ALL, "mean", True, 3, True, schemes=INT4),
    "awq": lambda: awq.primitives(ALL, 3, False, False, schemes=INT4),
    "outlier suppression plus": lambda: outlier_suppression_plus.primitives(
        ALL, ALL, "midrange", 3, 0.1, True, schemes=INT4
    ),
    "random orthogonal": lambda: random_orthogonal.primitives(12),
    "random orthogonal, hadamard heads": lambda: random_orthogonal.primitives(13, heads="hadamard"),
    "principal axes of activations": lambda: random_hadamard.primitives(14, basis="activations"),
    "principal axes of weights": lambda: random_orthogonal.primitives(15, ["R1"], basis="weights"),
    "quarot": lambda: quarot.primitives(16),
    "quarot, orthogonal mixing": lambda: quarot.primitives(16, "orthogonal"),
    "block hadamard": lambda: block_hadamard.primitives(16, ALL, False),
    "block hadamard, heads folded": lambda: block_hadamard.primitives(16, ALL, True),
    "duquant": lambda: duquant.primitives(17, 0.6, 16, 8, ALL, True),
    "duquant, a rotation per block": lambda: duquant.primitives(17, 0.6, 16, 8, ALL, False),
    "duquant, one rotation": lambda: duquant.primitives(17, 0.6, 16, 8, ALL, True, 1),
    "perq": lambda: perq.primitives(18, 16, "mass"),
    "wush": lambda: wush.primitives(16, ALL, True, 0.01),
    "reorder": lambda: reordering.primitives("rms", ALL, "across"),
    "reorder within heads": lambda: reordering.primitives("maximum", ALL, "within"),
    "rotation, then scaling": lambda: rotation_then_scaling.primitives(18, 0.5, [*NORMS, "output_input"], "maximum"),
    "shifting, then random hadamard": lambda: [*shifting.primitives("midrange", ALL), *random_hadamard.primitives(19)],
    "random hadamard, then shifting": lambda: [*random_hadamard.primitives(20), *shifting.primitives("mean", ALL)],
    "shifted, scaled, reordered, rotated": lambda: [
        *shifting.primitives("mean", ALL),
        *scaling.primitives(0.5, ALL),
        *reordering.primitives("mean", ["down_input", "output_input"], "within"),
        *random_hadamard.primitives(21, basis="activations"),
    ],
    "reordered, then in blocks": lambda: [
        *reordering.primitives("rms", ALL, "across"),
        *block_hadamard.primitives(16, ALL, False),
    ],
    "in blocks, then shifted": lambda: [
        *block_hadamard.primitives(16, [*NORMS, "down_input"], False),
        *shifting.primitives("midrange", ALL),
    ],
    "shifted, rotated, shifted, in blocks": lambda: [
        *shifting.primitives("midrange", ["output_input"]),
        RotateHeads(22, "plain"),
        *shifting.primitives("mean", ALL),
        GreedyBlocks(16, ["output_input"], 3, 23, 1, False),
        Zigzag(16, ALL),
        Reorder("rms", ["attention_input"], "across"),
    ],
}


def fits(recipe: str, case: Case) -> bool:
    return recipe != "quarot" or case.heads != 9


HARDEST = VARIED[1]  # all biases, a tied embedding, grouped queries
EVERY_KIND = "shifted, scaled, reordered, rotated"


def decisive(case: Case, recipe: str) -> bool:
    """Every recipe on the hardest case, every case with all kinds of primitives, and the order that
    no Hadamard matrix has."""
    return case == HARDEST or recipe == EVERY_KIND or (recipe == "quarot" and case == VARIED[0])


@dataclass
class Given:
    """A case on disk in float64: its logits, inputs of its linears, and these as a calibration."""

    case: Case
    folder: Path
    config: dict
    state: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor
    inputs: dict[tuple[int, str], Tensor]
    statistics: Path

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)

    def fitted(self, primitives: list) -> Transform:
        return fit(primitives, self.decoder, self.statistics)


@dataclass
class Folded:
    """A transformed decoder: its tensors, the operations that remain online, and the statistics in
    closed form."""

    state: dict[str, Tensor] = field(default_factory=dict)
    online: dict[tuple[int, str], list[dict]] = field(default_factory=dict)
    layers: list[DecoderLayer] = field(default_factory=list)


def folded(made: Given, transform: Transform, statistics: str | None = None) -> Folded:
    """``made`` under ``transform``, without statistics, with ``exact`` ones in float64 of all
    tokens, or with those of the calibration ``file``."""
    result, decoder = Folded(), made.decoder
    for index in range(decoder.shape.layers):
        layer = layer_state(decoder, index, made.statistics if statistics == "file" else None)
        if statistics == "exact":
            layer.statistics = {site: statistics_of(made.inputs[index, site]) for site in SITES}
        transform.fold_layer(layer)
        result.layers.append(layer)
        names = layer_tensors(decoder.shape, index)
        result.state |= {names[role]: tensor for role, tensor in layer.weights.items()}
        result.online |= {(index, site): operations for site, operations in layer.online.items()}
    ends = decoder.ends()
    transform.fold_ends(ends)
    result.state |= {END_ROLES[role]: tensor for role, tensor in ends.items()}
    return result


def changed(made: Given, result: Folded) -> float:
    """Largest difference of the logits of two windows, relative to the largest logit."""
    found, _ = run(result.state, made.config, made.tokens[:2], result.online)
    return ((found - made.logits).abs().max() / made.logits.abs().max()).item()


LLAMA = next(case for case in CASES if case.architecture == "LlamaForCausalLM" and case.heads == 4 and case.tied)


def heavy(tokens: int, n: int, seed: int = 0) -> Tensor:
    """(tokens, n) float64 with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    return x * torch.where(torch.rand(n, generator=generator) < 0.1, 30.0, 1.0)
