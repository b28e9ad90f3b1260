"""Primitives: orthogonal changes of basis R1, R2, R4, and head mixing.

Primitive R1 rotates the residual stream, R2 the values of every KV head, R4 (online) the input of
the down projection; head mixing is online. A randomized Hadamard rotation is stored as its signs s:
R = diag(s) H / sqrt(n), applied as x -> (x * s) H / sqrt(n). The same map is applied to the input x
and to the rows of the weights, so W R (x R)ᵀ = W xᵀ for symmetric and other H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...calibration.statistics import Rows
from ...ground.errors import ConfigError
from ...inference.input_maps import InputMap
from ...inference.online import Operation, as_rows
from ...inference.transform import Primitive, derived_seed
from ...linalg.hadamard import apply_hadamard, random_orthogonal, random_signs
from ...models.plans import kind_of
from ...models.shapes import Heads, ModelShape
from .stream import absorb_norm, center_ends, center_writers

BLOCK = 512  # rows of an embedding rotated at a time


def rotate_online(layer: DecoderLayer, site: str, operation: Operation) -> None:
    """Apply the orthogonal ``operation`` online at ``site`` and its inverse in the linears
    there."""
    rows = as_rows(operation)
    for linear in layer.plan.sites[site].linears:
        layer.weights[linear] = rows(layer.weights[linear])
    layer.add_online(site, dict(operation), lambda statistics: statistics.transformed(rows))


def turn_heads(layer: DecoderLayer, site: str, rows: Rows, online: Sequence[Operation] = ()) -> None:
    """Fold the map ``rows`` within heads into the values and o.

    Where a gate stands between them, or an online operation, the operations ``online`` do the same at run
    time; without them :class:`ConfigError` is raised.
    """
    read, weights = layer.plan.sites[site], layer.weights
    if online and (not read.turns or layer.blocking(site)):
        for operation in online:
            rotate_online(layer, site, operation)
        return
    if not read.turns or read.source is None:
        raise ConfigError(
            f"the values of a {layer.shape.architecture} cannot be rotated offline: a gate stands between them and "
            f"'{site}'; rotate online instead"
        )
    layer.require_foldable(site)
    weights[read.source] = rows(weights[read.source].mT).mT
    if (bias := f"{read.source}_bias") in weights:
        weights[bias] = rows(weights[bias])
    for linear in read.linears:
        weights[linear] = rows(weights[linear])
    layer.map_input(site, rows)


def _signed_hadamard(signs: Tensor) -> Rows:
    return lambda x: apply_hadamard(x * signs.to(x))


def _in_blocks(x: Tensor, rows: Rows) -> Tensor:
    """Apply ``rows`` to a tall matrix (vocabulary, n) in blocks of rows, to stay in the cache."""
    result = torch.empty_like(x)
    for start in range(0, len(x), BLOCK):
        result[start : start + BLOCK] = rows(x[start : start + BLOCK])
    return result


@dataclass
class RotateResidual(Primitive):
    """R1 (QuaRot, SpinQuant): orthonormal change of basis of the residual stream.

    Offline; unties the lm_head; a stream before LayerNorms loses its mean first. ``kind``: ``hadamard``
    (randomized, needs a reachable order) or ``orthogonal`` (Haar, any size). ``online``: the stream keeps
    its basis, and the inputs that read it are rotated online instead. That is exact behind norms whose
    output is added to the stream, through which an offline rotation cannot pass. Behind another online
    operation the norm keeps its gain.
    """

    kind: str
    seed: int
    online: bool = field(default=False, kw_only=True)

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        seed = derived_seed(self.seed, "R1")
        if self.kind == "hadamard":
            return {"signs": random_signs(shape.hidden_size, seed)}
        return {"matrix": random_orthogonal(shape.hidden_size, seed)}

    def _rows(self, parameters: dict[str, Tensor]) -> Rows:
        if "signs" in parameters:
            return _signed_hadamard(parameters["signs"])
        return lambda x: x @ parameters["matrix"].to(x)

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        rows, weights = self._rows(parameters), layer.weights
        for site in layer.plan.stream_sites:
            if not (self.online and layer.blocking(site.name)):
                layer.require_foldable(site.name)
                absorb_norm(layer, site.name)
            if self.online:
                rotate_online(layer, site.name, self._operation(parameters))
                continue
            for linear in site.consumers:
                weights[linear] = rows(weights[linear])
            layer.map_input(site.name, rows)
        if self.online:
            return
        if layer.plan.post_norms:
            raise ConfigError(
                f"the residual stream of a {layer.shape.architecture} cannot be rotated offline: the norms "
                f"{', '.join(layer.plan.post_norms)} stand before it; rotate online instead"
            )
        center_writers(layer)
        for linear in layer.plan.writers:
            weights[linear] = rows(weights[linear].mT).mT
            if f"{linear}_bias" in weights:
                weights[f"{linear}_bias"] = rows(weights[f"{linear}_bias"])

    def _operation(self, parameters: dict[str, Tensor]) -> Operation:
        """The rotation as an online operation."""
        if parameters.keys() == {"signs"}:
            return {"operation": "signed_hadamard", **parameters}
        if parameters.keys() == {"matrix"}:
            return {"operation": "block_rotate", "blocks": parameters["matrix"][None]}
        first = next(iter(parameters.values()))
        units = torch.eye(len(first), dtype=torch.float64, device=first.device)
        return {"operation": "block_rotate", "blocks": self._rows(parameters)(units)[None]}

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        if self.online:
            return
        rows = self._rows(parameters)
        head, gain, bias = ends.get("lm_head", ends["embedding"]), ends["final_norm"], ends.get("final_norm_bias")
        if bias is not None:
            ends["lm_head_bias"] = ends.get("lm_head_bias", 0.0) + head @ bias
            ends["final_norm_bias"] = torch.zeros_like(bias)
        ends["lm_head"] = _in_blocks(head, lambda block: rows(block * gain))
        center_ends(ends)
        for role in ("embedding", "positions"):
            if role in ends:
                ends[role] = _in_blocks(ends[role], rows)
        ends["final_norm"] = torch.ones_like(ends["final_norm"])


def by_head(matrices: Tensor, heads: Heads) -> Tensor:
    """Matrices of the groups (groups, k, k) as blocks of an online rotation: one a head, or one for all."""
    return matrices if heads.groups == 1 else matrices.repeat_interleave(heads.count // heads.groups, 0)


@dataclass
class RotateHeads(Primitive):
    """R2 (SpinQuant; QuaRot's per-head rotation): rotation of the values of every KV head. Offline.

    It is undone in the columns of o. ``kind``: ``hadamard`` (randomized, signs per KV head),
    ``plain`` (the Hadamard matrix itself for all heads, as in QuaRot) or ``orthogonal`` (Haar, one
    per KV head, any size). ``online``: where a gate stands behind the attention, the inputs of o are rotated
    at run time instead; all heads of linear attention have one rotation.
    """

    seed: int
    kind: str = "hadamard"
    online: bool = field(default=False, kw_only=True)

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        (site,) = layer.plan.sites_of(["output_input"])
        heads = layer.shape.heads_at(site)
        if self.kind == "plain":
            return {}
        if self.kind == "hadamard":
            return {"signs": random_signs(heads.groups * heads.size, derived_seed(self.seed, "R2", layer.index))}
        seeds = (derived_seed(self.seed, "R2", layer.index, group) for group in range(heads.groups))
        return {"matrices": torch.stack([random_orthogonal(heads.size, seed) for seed in seeds])}

    def _rows(self, heads: Heads, parameters: dict[str, Tensor]) -> Rows:
        """Rotate x (..., heads x head_dim or groups x head_dim); shapes are unchanged.

        The heads of a group share its rotation.
        """

        def rotated(x: Tensor) -> Tensor:
            if "matrices" in parameters:
                return x @ parameters["matrices"].to(x)
            signs = parameters["signs"].view(heads.groups, 1, -1).to(x) if "signs" in parameters else 1.0
            return apply_hadamard(x * signs)

        return lambda x: rotated(x.unflatten(-1, (heads.groups, -1, heads.size))).flatten(-3)

    def _operations(self, heads: Heads, parameters: dict[str, Tensor]) -> list[Operation]:
        """The rotation as online operations."""
        if parameters.keys() <= {"signs"}:
            hadamard: Operation = {"operation": "block_hadamard", "size": heads.size}
            if not parameters:
                return [hadamard]
            signs = parameters["signs"].view(heads.groups, 1, -1).expand(-1, heads.count // heads.groups, -1)
            return [{"operation": "multiply", "factor": signs.flatten()}, hadamard]
        return [{"operation": "block_rotate", "blocks": by_head(self._matrices(heads, parameters), heads)}]

    def _matrices(self, heads: Heads, parameters: dict[str, Tensor]) -> Tensor:
        """Rotations of the groups (groups, head_dim, head_dim)."""
        units = torch.eye(heads.size).repeat(1, heads.groups).to(next(iter(parameters.values()), torch.empty(0)))
        return self._rows(heads, parameters)(units).unflatten(-1, (heads.groups, -1)).transpose(0, 1)

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        (site,) = layer.plan.sites_of(["output_input"])
        heads = layer.shape.heads_at(site)
        online = self._operations(heads, parameters) if self.online else []
        turn_heads(layer, site, self._rows(heads, parameters), online)

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor], before: InputMap) -> InputMap:
        if kind_of(site) != "output_input":
            return before
        return before.rotated(self._matrices(shape.heads_at(site), parameters))


@dataclass
class RotateDown(Primitive):
    """R4 (QuaRot, SpinQuant): online Hadamard transform of the down projection's input.

    It is undone in the weight.
    """

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(["down_input"]):
            rotate_online(layer, site, {"operation": "hadamard"})

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor], before: InputMap) -> InputMap:
        if kind_of(site) != "down_input":
            return before
        return before.then(apply_hadamard, partial(apply_hadamard, transposed=True))


@dataclass
class MixHeads(Primitive):
    """Head mixing before o (QuaRot, arXiv 2404.00456, section 4): x (M ⊗ I) online, undone in o.

    ``kind``: ``hadamard``, as published, needs a Hadamard matrix of order heads; ``orthogonal``
    (Haar, one per layer) accepts any number of heads.
    """

    seed: int
    kind: str

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        if self.kind == "hadamard":
            return {}
        (site,) = layer.plan.sites_of(["output_input"])
        heads = layer.shape.heads_at(site).count
        return {"matrix": random_orthogonal(heads, derived_seed(self.seed, "heads", layer.index))}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        (site,) = layer.plan.sites_of(["output_input"])
        mixing = (
            {"operation": "head_rotate", **parameters}
            if parameters
            else {"operation": "head_hadamard", "heads": layer.shape.heads_at(site).count}
        )
        rotate_online(layer, site, mixing)
