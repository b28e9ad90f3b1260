"""Primitives: orthogonal changes of basis. R1 of the residual stream, R2 of every KV head, mixed heads (online), R4 (online) before the
down projection.

A randomized Hadamard rotation is kept as its signs s: R = diag(s) H / sqrt(n), applied as x -> (x * s) H / sqrt(n). The same map
goes onto the input x and onto the rows of the weights, so W R (x R)ᵀ = W xᵀ whatever the symmetry of H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..architecture import NORM_OF, SITES, ModelShape
from ..decoders import DecoderLayer
from ..hadamard import apply_hadamard, random_orthogonal, random_signs
from ..online import Operation, as_rows
from ..statistics import Rows
from .composition import InputMap, derived_seed

BLOCK = 512  # rows of an embedding rotated at a time


def absorb_norm(layer: DecoderLayer, site: str) -> None:
    """Move the gain of the norm before ``site`` into its linears; a channel of zero gain keeps zero statistics."""
    gain = layer.weights[NORM_OF[site]]
    for linear in SITES[site]:
        layer.weights[linear] = layer.weights[linear] * gain
    layer.weights[NORM_OF[site]] = torch.ones_like(gain)
    layer.map_input(site, torch.where(gain == 0, 0.0, 1 / gain))


def turn_online(layer: DecoderLayer, site: str, operation: Operation) -> None:
    """Let the orthogonal ``operation`` act online at ``site`` and undo it in the linears there."""
    rows = as_rows(operation)
    for linear in SITES[site]:
        layer.weights[linear] = rows(layer.weights[linear])
    layer.add_online(site, dict(operation), lambda statistics: statistics.transformed(rows))


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
            layer.require_foldable(site)
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
    """R2 (SpinQuant; QuaRot's per-head rotation): every KV head's values rotated, undone in the columns of o. Offline.

    ``kind``: ``hadamard`` (randomized, signs per KV head), ``plain`` (the Hadamard matrix itself for all heads, as QuaRot has it) or
    ``orthogonal`` (Haar, one per KV head, any size).
    """

    seed: int
    kind: str = "hadamard"
    reads_layer = False

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        heads, size = layer.shape.kv_heads, layer.shape.head_dim
        if self.kind == "plain":
            return {}
        if self.kind == "hadamard":
            return {"signs": random_signs(heads * size, derived_seed(self.seed, "R2", layer.index))}
        return {"matrices": torch.stack([random_orthogonal(size, derived_seed(self.seed, "R2", layer.index, head)) for head in range(heads)])}

    def _rows(self, shape: ModelShape, parameters: dict[str, Tensor], inverse: bool = False) -> Rows:
        """x (..., heads x head_dim or KV heads x head_dim) -> the same shape; the query heads of a group share its rotation."""

        def rotated(x: Tensor) -> Tensor:
            if "matrices" in parameters:
                return x @ (parameters["matrices"].mT if inverse else parameters["matrices"]).to(x)
            signs = parameters["signs"].view(shape.kv_heads, 1, -1).to(x) if "signs" in parameters else 1.0
            return apply_hadamard(x, transposed=True) * signs if inverse else apply_hadamard(x * signs)

        return lambda x: rotated(x.unflatten(-1, (shape.kv_heads, -1, shape.head_dim))).flatten(-3)

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        layer.require_foldable("output_input")
        rows = self._rows(layer.shape, parameters)
        layer.weights["v"] = rows(layer.weights["v"].mT).mT
        if "v_bias" in layer.weights:
            layer.weights["v_bias"] = rows(layer.weights["v_bias"])
        layer.weights["o"] = rows(layer.weights["o"])
        layer.map_input("output_input", rows)

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor]) -> InputMap | None:
        return (self._rows(shape, parameters), self._rows(shape, parameters, inverse=True)) if site == "output_input" else None

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
        turn_online(layer, "down_input", {"operation": "hadamard"})

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor]) -> InputMap | None:
        return (apply_hadamard, partial(apply_hadamard, transposed=True)) if site == "down_input" else None

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: this input lives inside the layers."""


@dataclass
class MixHeads:
    """The heads mixed before o (QuaRot, arXiv 2404.00456, section 4): x (M ⊗ I) online, undone in o.

    ``kind``: ``hadamard``, as published, needs a Hadamard matrix of order heads; ``orthogonal`` (Haar, one per layer) takes any number.
    """

    seed: int
    kind: str
    reads_layer = False

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        if self.kind == "hadamard":
            return {}
        return {"matrix": random_orthogonal(layer.shape.heads, derived_seed(self.seed, "heads", layer.index))}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        mixing = {"operation": "head_rotate", **parameters} if parameters else {"operation": "head_hadamard", "heads": layer.shape.heads}
        turn_online(layer, "output_input", mixing)

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: this input lives inside the layers."""
