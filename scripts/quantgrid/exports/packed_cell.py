"""A quantized cell as an exporter reads it: layer by layer, under the tensor names of its architecture.

A checkpoint of quantgrid has canonical names: joined linears apart, gains explicit. Exported files
have the names and the values that transformers reads, so linears are joined again along their rows
and the offset of gains is taken off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.accumulators import site_name
from ..ground.errors import ConfigError, NumericalFailure
from ..inference.linear import CLIP
from ..inference.online import restored
from ..models.plans import END_ROLES, LAYER_PREFIX, kind_of
from ..models.shapes import ModelShape
from ..quantization.checkpoints import PackedCheckpoint
from ..quantization.code_storage import PARAMETERS
from ..quantization.packed_linears import PackedLinear, take_linear
from ..quantizer.tensors import QuantizedTensor
from ..schemes.cell_schemes import CellSchemes
from ..schemes.quant_scheme import QuantScheme
from .features import Features, in_some_layers


@dataclass(frozen=True)
class SiteState:
    """Preparation of the input of one site: online operations (with their tensors, float32), the
    scheme of its rounding (None: not rounded), and calibrated parameters by name (``scale``,
    ``zero_point``, ``global_scale``, ``clip_low``, ``clip_high``)."""

    online: list[dict[str, Any]] = field(default_factory=list)
    scheme: QuantScheme | None = None
    fixed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportLayer:
    """One decoder layer.

    ``parts`` maps the names of the architecture's linears, in the order of the plan, to the linears of
    the cell that each holds (several in a joined one), ``roles`` to their roles, ``site_of`` to the site
    that they read.
    ``plain`` are all other tensors, in float32 with full names; biases of linears are in the
    linears. ``sites`` maps the names of sites (``attention_input``) to their state.
    """

    index: int
    parts: dict[str, list[PackedLinear]]
    roles: dict[str, tuple[str, ...]]
    site_of: dict[str, str]
    plain: dict[str, Tensor]
    sites: dict[str, SiteState]

    @property
    def linears(self) -> list[PackedLinear]:
        """Linears of the cell, parts of joined ones apart."""
        return [linear for held in self.parts.values() for linear in held]

    @property
    def joined(self) -> list[PackedLinear]:
        """Linears of the architecture; a joined one has the codes of its parts (:func:`joined`)."""
        return [joined(name, held) for name, held in self.parts.items()]

    def bias(self, name: str) -> Tensor | None:
        """Bias of the linear ``name`` of the architecture."""
        found = [part.bias for part in self.parts[name]]
        return None if found[0] is None else torch.cat(found)  # type: ignore[arg-type]


class PackedCell:
    """A cell's checkpoint in ``folder`` (``model.safetensors`` and ``quantgrid.json``), opened for
    export.

    Raises :class:`ConfigError` as :class:`~quantgrid.quantization.checkpoints.PackedCheckpoint`, and
    with the reason of a failed cell.
    """

    def __init__(self, folder: str | Path, manifest: str | Path | None = None):
        try:
            self.checkpoint = PackedCheckpoint(folder, manifest=manifest)
        except NumericalFailure as failure:
            raise ConfigError(f"the cell failed and cannot be exported: {failure}") from None
        self.about: dict[str, Any] = self.checkpoint.about
        self.shape: ModelShape = self.checkpoint.shape

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the cell; tied is what the checkpoint says."""
        return self.about["config"]

    @property
    def is_tied(self) -> bool:
        """Check whether the lm_head is the embedding."""
        return bool(self.config.get("tie_word_embeddings"))

    @cached_property
    def schemes(self) -> CellSchemes:
        """Schemes of the cell; activations by site, as calibrated."""
        activations: dict[str, list[QuantScheme]] = {}
        for name, fields in self.about["activations"].items():
            scheme, found = QuantScheme.from_dict(fields), activations.setdefault(site_kind(name), [])
            if scheme not in found:
                found.append(scheme)
        return replace(self.checkpoint.schemes, activation=activations)

    @cached_property
    def online(self) -> dict[str, list[dict[str, Any]]]:
        """Kind of site -> its online operations, without tensors, each operation once."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name, operations in self.about["online"].items():
            kept = found.setdefault(site_kind(name), [])
            kept.extend(operation for operation in operations if operation not in kept)
        return found

    @property
    def has_outliers(self) -> bool:
        """Check whether any linear keeps outliers or residual columns."""
        return any(entry["outliers"] or "residual" in entry for entry in self.about["linears"].values())

    @property
    def branch_inputs(self) -> set[str]:
        """Activations that low-rank terms multiply; empty without low-rank terms."""
        terms = (entry["low_rank"] for entry in self.about["linears"].values())
        return {term["input"] for term in terms if term}

    def without_rounded_cache(self) -> PackedCheckpoint:
        """Checkpoint for a model that leaves keys and values unrounded, as exported files do."""
        made = copy(self.checkpoint)
        made.about = {**self.about, "schemes": {**self.about["schemes"], "key_value": None}}
        return made

    def features(self) -> Features:
        """Features of the cell, from its manifest and the names of its tensors."""
        names, plan = self.checkpoint.names(), self.shape.plan(0)
        own = self.shape.family.biased(self.config)
        biased = [role for role in plan.linears if f"{LAYER_PREFIX.format(layer=0)}{plan.modules[role]}.bias" in names]
        return Features(
            self.shape,
            self.schemes,
            {site: self._operations(site) for site in self.online},
            frozenset(self.branch_inputs),
            self.has_outliers,
            tuple(role for role in biased if role not in own),
            any(name.endswith(".clip_high") for name in names),
            self.shares_global_scale(),
        )

    def _operations(self, kind: str) -> tuple[str, ...]:
        """Names of the online operations at sites of ``kind``."""
        plans = (self.shape.plan(index) for index in range(self.shape.layers))
        sites = sum(kind_of(site) == kind for plan in plans for site in plan.sites)
        everywhere = sum(site_kind(name) == kind for name in self.about["online"]) == sites
        names = (operation["operation"] for operation in self.online[kind])
        return tuple(name if everywhere else in_some_layers(name) for name in names)

    def shares_global_scale(self) -> bool:
        """Check whether the rounded linears of each site have one global scale for the weights."""
        if not any(scheme.global_scale in ("tensor", "site") for scheme in self.schemes.weights):
            return False
        for index in range(self.shape.layers):
            prefix, plan = LAYER_PREFIX.format(layer=index), self.shape.plan(index)
            for site in plan.sites.values():
                rounded = [prefix + plan.modules[role] for role in site.linears if self.checkpoint.is_rounded(role)]
                found = self.checkpoint.read(*(f"{name}.global_scale" for name in rounded))
                if len({tuple(tensor.flatten().tolist()) for tensor in found.values()}) > 1:
                    return False
        return True

    def ends(self) -> dict[str, Tensor]:
        """Embedding, final norm and lm_head (unless tied) by their names, as stored in bfloat16 and
        float32."""
        found = self.checkpoint.read(*END_ROLES.values())
        norm = END_ROLES["final_norm"]
        return {**found, norm: found[norm] - self.shape.family.gain_offset}

    def layers(self) -> Iterator[ExportLayer]:
        """Read the decoder layers one at a time."""
        for index in range(self.shape.layers):
            yield self.layer(index)

    def layer(self, index: int) -> ExportLayer:
        """Read decoder layer ``index``."""
        prefix, plan = LAYER_PREFIX.format(layer=index), self.shape.plan(index)
        tensors = self.checkpoint.read(prefix, site_name(index, ""))
        parts: dict[str, list[tuple[str, PackedLinear]]] = {}
        for role in plan.linears:
            name = prefix + plan.modules[role]
            linear = take_linear(name, self.about, tensors, self.checkpoint.weight_scheme(index, role))
            place = plan.stored.get(f"{plan.modules[role]}.weight")
            whole = name if place is None else prefix + place.name.removesuffix(".weight")
            parts.setdefault(whole, []).append((role, linear))
        sites = {name: self._site(index, name, tensors) for name in plan.sites}
        plain = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                place = plan.stored.get(name.removeprefix(prefix))
                plain[prefix + place.name if place else name] = tensor - (place.offset if place else 0.0)
        return ExportLayer(
            index,
            {whole: [linear for _, linear in held] for whole, held in parts.items()},
            {whole: tuple(role for role, _ in held) for whole, held in parts.items()},
            {whole: plan.site_of[held[0][0]] for whole, held in parts.items()},
            plain,
            sites,
        )

    def _site(self, index: int, site: str, tensors: Mapping[str, Tensor]) -> SiteState:
        name = site_name(index, site)
        scheme = self.about["activations"].get(name)
        return SiteState(
            restored(name, self.about["online"].get(name, []), tensors),
            QuantScheme.from_dict(scheme) if scheme else None,
            {part: tensors[f"{name}.{part}"] for part in (*PARAMETERS, *CLIP) if f"{name}.{part}" in tensors},
        )


def site_kind(name: str) -> str:
    """Kind of a stored site name: ``down_input`` of ``layers.3.down_input.17``."""
    return kind_of(name.split(".", 2)[2])


def joined(name: str, parts: list[PackedLinear]) -> PackedLinear:
    """The linear ``name`` whose rows are those of ``parts`` one after another.

    A scale per tensor becomes one per row. Raises :class:`ConfigError` if they share no global scale,
    or if they have low-rank terms, outliers or residual columns.
    """
    if len(parts) == 1:
        return replace(parts[0], name=name)
    first = parts[0]
    bias = None if first.bias is None else torch.cat([part.bias for part in parts])  # type: ignore[misc]
    if first.quantized is None:
        return PackedLinear(name, weight=torch.cat([part.dense(part.weight.dtype) for part in parts]), bias=bias)  # type: ignore[union-attr]
    if any(held is not None for part in parts for held in (part.low_rank, part.outliers, part.residual)):
        raise ConfigError(f"{name}: low-rank terms, outliers and residual columns of joined linears cannot be exported")
    held = [by_rows(part.quantized) for part in parts]  # type: ignore[arg-type]
    glob = held[0].global_scale
    if glob is not None and any(not torch.equal(glob, other.global_scale) for other in held):  # type: ignore[arg-type]
        raise ConfigError(
            f"{name}: its parts have different global scales, and one linear of this model holds all of them; "
            "quantize with global_scale: site"
        )
    rows = {
        part: None if getattr(held[0], part) is None else torch.cat([getattr(other, part) for other in held])
        for part in ("codes", "scale", "zero_point", "codebook")
    }
    return PackedLinear(
        name,
        QuantizedTensor(global_scale=glob, scheme=held[0].scheme, dtype=held[0].dtype, **rows),  # type: ignore[arg-type]
        bias=bias,
    )


def by_rows(quantized: QuantizedTensor) -> QuantizedTensor:
    """``quantized`` with a scale per row in the place of one per tensor; others unchanged."""
    if quantized.scheme.granularity != "tensor":
        return quantized
    rows = len(quantized.codes)
    spread = {
        part: None if getattr(quantized, part) is None else getattr(quantized, part).expand(rows, -1).contiguous()
        for part in ("scale", "zero_point")
    }
    return replace(quantized, scheme=replace(quantized.scheme, granularity="channel"), **spread)
