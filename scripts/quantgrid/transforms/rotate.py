"""Primitives: orthogonal changes of basis. R1 of the residual stream, R2 of every KV head, R4 (online) before the down projection.

A randomized Hadamard rotation is kept as its signs s: R = diag(s) H / sqrt(n), applied as x -> (x * s) H / sqrt(n). The same map
goes onto the input x and onto the rows of the weights, so W R (x R)ᵀ = W xᵀ whatever the symmetry of H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import NORM_OF, SITES, ModelShape
from ..decoders import DecoderLayer
from ..hadamard import apply_hadamard, random_orthogonal, random_signs
from ..statistics import Rows
from .composition import derived_seed

BLOCK = 512  # rows of an embedding rotated at a time


def absorb_norm(layer: DecoderLayer, site: str) -> None:
    """Move the gain of the norm before ``site`` into its linears; a channel of zero gain keeps zero statistics."""
    gain = layer.weights[NORM_OF[site]]
    for linear in SITES[site]:
        layer.weights[linear] = layer.weights[linear] * gain
    layer.weights[NORM_OF[site]] = torch.ones_like(gain)
    layer.map_input(site, torch.where(gain == 0, 0.0, 1 / gain))


def _signed_hadamard(signs: Tensor) -> Rows:
    return lambda x: apply_hadamard(x * signs.to(x))


def _in_blocks(x: Tensor, rows: Rows) -> Tensor:
    """``rows`` of a tall matrix (vocabulary, n), some rows at a time: the steps between stay in the cache."""
    result = torch.empty_like(x)
    for start in range(0, len(x), BLOCK):
        result[start : start + BLOCK] = rows(x[start : start + BLOCK])
    return result


@dataclass
class RotateResidual:
    """R1 (QuaRot, SpinQuant): the residual stream in another orthonormal basis. Offline; unties the lm_head.

    ``kind``: ``hadamard`` (randomized, needs an order within reach) or ``orthogonal`` (Haar, any size).
    """

    kind: str
    seed: int
    reads_layer = False

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        seed = derived_seed(self.seed, "R1")
        if self.kind == "hadamard":
            return {"signs": random_signs(shape.hidden_size, seed)}
        return {"matrix": random_orthogonal(shape.hidden_size, seed)}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {}

    def _rows(self, parameters: dict[str, Tensor]) -> Rows:
        if "signs" in parameters:
            return _signed_hadamard(parameters["signs"])
        return lambda x: x @ parameters["matrix"].to(x)

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        rows, weights = self._rows(parameters), layer.weights
        for site in NORM_OF:
            absorb_norm(layer, site)
            for linear in SITES[site]:
                weights[linear] = rows(weights[linear])
            layer.map_input(site, rows)
        for linear in ("o", "down"):
            weights[linear] = rows(weights[linear].mT).mT
            if f"{linear}_bias" in weights:
                weights[f"{linear}_bias"] = rows(weights[f"{linear}_bias"])

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        rows = self._rows(parameters)
        head, gain = ends.get("lm_head", ends["embedding"]), ends["final_norm"]
        ends["lm_head"] = _in_blocks(head, lambda block: rows(block * gain))
        ends["embedding"] = _in_blocks(ends["embedding"], rows)
        ends["final_norm"] = torch.ones_like(ends["final_norm"])


@dataclass
class RotateHeads:
    """R2 (SpinQuant; QuaRot's per-head rotation): every KV head's values rotated, undone in the columns of o. Offline."""

    seed: int
    reads_layer = False

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        size = layer.shape.kv_heads * layer.shape.head_dim
        return {"signs": random_signs(size, derived_seed(self.seed, "R2", layer.index))}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        shape = layer.shape
        signs = parameters["signs"].view(shape.kv_heads, 1, shape.head_dim)

        def rows(x: Tensor) -> Tensor:
            return apply_hadamard(x.unflatten(-1, (shape.kv_heads, -1, shape.head_dim)) * signs.to(x)).flatten(-3)

        layer.weights["v"] = rows(layer.weights["v"].mT).mT
        if "v_bias" in layer.weights:
            layer.weights["v_bias"] = rows(layer.weights["v_bias"])
        layer.weights["o"] = rows(layer.weights["o"])
        layer.map_input("output_input", rows)

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: values live inside the layers."""


@dataclass
class RotateDown:
    """R4 (QuaRot, SpinQuant): a Hadamard transform of the down projection's input, computed online, undone in its weight."""

    reads_layer = False

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        layer.weights["down"] = apply_hadamard(layer.weights["down"])
        layer.map_input("down_input", apply_hadamard)
        layer.online["down_input"].append({"operation": "hadamard"})

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: this input lives inside the layers."""
