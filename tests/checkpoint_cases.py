"""Tiny decoders, quantized and saved, for the tests of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantgrid.calibration.layers import DecoderFolder, DecoderLayer
from quantgrid.inference.transform import Transform, fit, layer_state
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import SITES
from quantgrid.quantization.cached import Quantized, Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import (
    save_quantized,
)
from quantgrid.schemes import PRESETS, QuantScheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes
from quantgrid.transforms.recipes import block_hadamard, duquant, quarot, random_hadamard, reordering, scaling, shifting
from tiny_decoders import CASES

LLAMA = next(case for case in CASES if case.bias and case.tied)
CASE_OF = {
    "llama": LLAMA,
    **{
        name: next(case for case in CASES if case.architecture.lower().startswith(name) and want(case))
        for name, want in (
            ("mistral", lambda c: c.head_dim == 32),
            ("qwen2", lambda c: not c.tied and c.heads == 4),
            ("qwen3", lambda c: c.bias),
        )
    },
}
TRANSFORMS = {
    "none": [],
    "scaling": scaling.primitives(0.5, list(SITES)),
    "hadamard": random_hadamard.primitives(1),
    "shifting": [*shifting.primitives("midrange", list(SITES)), *quarot.primitives(2, "orthogonal")],
    "blocks": [
        *reordering.primitives("rms", list(SITES), "across"),
        *block_hadamard.primitives(16, list(SITES), False),
    ],
    "duquant": duquant.primitives(3, 0.6, 16, 4, list(SITES), True),
}
WIDE = replace(LLAMA, hidden=128, intermediate=256, head_dim=32)  # for groups of 64 and 128
QUANTIZED = [name for name, preset in PRESETS.items() if preset["weight"]]
GRANULAR = [
    *((name, "channel") for name in QUANTIZED),
    ("int4", "tensor"),
    ("int4_asym", "tensor"),
    ("int4_asym", "group-16"),
    ("int3", "group-32"),
    ("fp4", "group-16"),
    ("kmeans4", "group-32"),
    ("fp4_ue2m2", "group-16"),
]


def case_of(preset: str) -> str:
    """Name of the decoder whose sizes the block of a preset divides."""
    return "wide" if (PRESETS[preset]["block"] or 1) > 32 else "llama"


@dataclass
class Given:
    """A tiny decoder on disk, tokens, and calibration statistics of all of them."""

    folder: Path
    config: dict
    tokens: Tensor
    statistics: Path

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)


def schemes(preset: str, granularity: str = "channel") -> tuple[QuantScheme | None, QuantScheme | None]:
    if preset == "bf16":
        return None, None
    found = cell_schemes({"preset": preset}, granularity, "test")
    candidates = found["activation"].get("down_input")
    return QuantScheme.from_dict(found["weight"]) if found["weight"] else None, QuantScheme.from_dict(
        candidates[0]
    ) if candidates else None


def everywhere(scheme: QuantScheme | None) -> dict[str, list[QuantScheme]]:
    """One activation scheme at every site."""
    return {site: [scheme] for site in SITES} if scheme else {}


def quantized(made: Given, transform="none", preset="int4", granularity="channel", mitigation=rtn) -> Quantized:
    fitted = fit(TRANSFORMS[transform], made.decoder, made.statistics)
    weight, activation = schemes(preset, granularity)
    return quantize_decoder(
        made.decoder, Recipe(fitted, CellSchemes(weight, everywhere(activation)), mitigation, made.statistics)
    )


def saved(done: Quantized, folder: Path) -> Path:
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
    return folder


def transformed_layers(made: Given, transform: Transform) -> list[DecoderLayer]:
    layers = [layer_state(made.decoder, index, made.statistics) for index in range(made.decoder.shape.layers)]
    for layer in layers:
        transform.fold_layer(layer)
    return layers


def static_rounding(x: Tensor, low: float, high: float) -> Tensor:
    """Asymmetric INT4 with one range [low, high], from its definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = torch.tensor((high - low) / 15, dtype=torch.float32).double()
    zero = torch.round(-torch.tensor(low) / step.float()).double()
    return (torch.clamp(torch.round(x / step) + zero, 0, 15) - zero) * step
