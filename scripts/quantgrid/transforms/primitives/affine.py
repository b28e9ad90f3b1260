"""Primitive: invertible Kronecker products at the inputs of the linears.

FlatQuant (arXiv 2410.09426): x̃ = x (P1 ⊗ P2) and W̃ = W (P1 ⊗ P2)^{-T}, with P = U diag(sigma) Vᵀ
stored by its factors, so that the inverse transpose U diag(1/sigma) Vᵀ needs no matrix inverse.
``attention_input``, ``mlp_input`` and ``down_input`` are transformed online. At ``output_input`` P1
mixes the heads online and P2, shared by all heads, moves into the value projection; behind a gate it stays
online too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...inference.transform import Primitive, derived_seed
from ...linalg.hadamard import random_orthogonal
from ...linalg.kronecker import apply_kronecker
from ...linalg.kronecker_sizes import kronecker_sizes
from ...models.plans import kind_of
from ...models.shapes import ModelShape

FACTORS = ("left", "right")


def factor_sizes(shape: ModelShape, site: str) -> tuple[int, int]:
    """(n1, n2) of a site: (heads, head_dim) at ``output_input``, elsewhere the split of its
    inputs."""
    if kind_of(site) != "output_input":
        return kronecker_sizes(shape.site_size(site))
    heads = shape.heads_at(site)
    return heads.count, heads.size


def matrices(parameters: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """(P, P^{-T}) of the factor ``name``, from its U, sigma and V."""
    u, sigma, v = (parameters[f"{name}.{part}"] for part in ("u", "sigma", "v"))
    return (u * sigma) @ v.mT, (u / sigma) @ v.mT


@dataclass
class Affine(Primitive):
    """P1 ⊗ P2 at ``sites``, initially random orthogonal: U and V from the Haar measure, sigma =
    1."""

    sites: list[str]
    seed: int
    learns: ClassVar[dict[str, str]] = {"u": "cayley", "sigma": "positive", "v": "cayley"}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return dict(entry for site in layer.plan.sites_of(self.sites) for entry in self._start(layer, site))

    def _start(self, layer: DecoderLayer, site: str) -> Iterator[tuple[str, Tensor]]:
        for side, size in zip(FACTORS, factor_sizes(layer.shape, site)):
            for part in ("u", "v"):
                yield (
                    f"{site}.{side}.{part}",
                    random_orthogonal(size, derived_seed(self.seed, "affine", layer.index, site, side, part)),
                )
            yield f"{site}.{side}.sigma", torch.ones(size, dtype=torch.float64)

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            (left, left_inverse), (right, right_inverse) = (matrices(parameters, f"{site}.{side}") for side in FACTORS)
            for linear in layer.plan.sites[site].linears:
                layer.weights[linear] = apply_kronecker(layer.weights[linear], left_inverse, right_inverse)
            folds = layer.plan.sites[site].turns
            if folds:
                self._turn_values(layer, right)
            rows = partial(apply_kronecker, left=left, right=right)
            online = {"left": left} if folds else {"left": left, "right": right}
            layer.add_online(
                site, {"operation": "kronecker", **online}, lambda statistics, rows=rows: statistics.transformed(rows)
            )

    def _turn_values(self, layer: DecoderLayer, right: Tensor) -> None:
        """Multiply the values of every KV head by ``right`` (head_dim, head_dim)."""
        for role in ("v", "v_bias"):
            if role in layer.weights:
                heads = layer.weights[role].unflatten(0, (layer.shape.kv_heads, -1))
                layer.weights[role] = (
                    heads @ right.to(heads) if role == "v_bias" else right.to(heads).mT @ heads
                ).flatten(0, 1)
