"""Packed checkpoints: codes packed into bytes, scales in their own dtype, and a manifest.

``model.safetensors`` holds per linear ``{name}.codes``, ``.scale`` and, if the scheme has them,
``.zero_point``, ``.global_scale``, ``.codebook``, and the tensors that ``compensation_storage.py``
lists (low-rank factors, outliers, residual columns). Scales and zero points of fewer than 8 bits are packed like
codes. Tensors of online operations are named ``{site}.online.{number}.{name}``; all other tensors
keep their names. ``quantgrid.json`` holds the model config, the schemes (``activations`` per site,
``candidates`` of an allocation), the kinds of the quantized linears (``rounded``), the shapes of the
linears, each with the name of its scheme after an allocation, the online operations, and the sha256 of
the tensor file.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.accumulators import site_name
from ..calibration.streaming import FullPrecision, Source
from ..ground.errors import ConfigError, NumericalFailure
from ..ground.storage import open_tensors, read_json, settle, sha256_of, write_json, write_tensors
from ..ground.tensor_files import write_each
from ..inference.key_values import round_key_values
from ..inference.linear import CLIP, QuantizedLinear, Rounding, SiteInput
from ..inference.online import restored, stored
from ..models.plans import END_ROLES, LAYER_PREFIX, kind_of, linear_key
from ..models.shapes import module_name, shape_from_config
from ..models.skeletons import fill, require_filled, skeleton
from ..quantizer.quantized_weight import Compensated
from ..schemes.cell_schemes import CellSchemes, KeyValueScheme
from ..schemes.quant_scheme import QuantScheme
from .code_storage import PARAMETERS, code_tensors
from .compensation_storage import side_entry, side_tensors
from .linear_groups import is_tied
from .packed_linears import take_linear

FORMAT_VERSION = 6


@dataclass
class CheckpointContent:
    """Content of a checkpoint, filled layer by layer; ``tensors`` may be a
    ``tensor_files.TensorSpool``."""

    config: Mapping[str, Any]
    schemes: CellSchemes
    activations: dict[str, QuantScheme] = field(default_factory=dict)
    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    online: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add_plain(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Add unquantized tensors: norms and biases in float32, embeddings in bfloat16."""
        self._put({name: tensor.to(dtype) for name, tensor in tensors.items()})

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add ``tensors`` from any device; they are kept on the CPU."""
        self.tensors.update({name: tensor.cpu() for name, tensor in tensors.items()})

    def add_ends(self, ends: Mapping[str, Tensor]) -> None:
        """Add embedding and lm_head in bfloat16, what else is outside of the layers in float32; a tied
        lm_head is omitted."""
        for role, tensor in ends.items():
            dtype = torch.bfloat16 if role in ("embedding", "lm_head") else torch.float32
            self.add_plain({END_ROLES[role]: tensor}, dtype)
        self.config = {**self.config, "tie_word_embeddings": "lm_head" not in ends}

    def add_site(self, layer: int, site: str, online: list[dict[str, Any]], rounding: Rounding | None) -> None:
        """Add the online operations of a site and the scheme of its input, with calibrated
        parameters."""
        name = site_name(layer, site)
        if online:
            self.online[name], tensors = stored(name, online)
            self._put(tensors)
        if rounding is not None:
            self.activations[name] = rounding.scheme
            self._put({f"{name}.{part}": tensor for part, tensor in rounding.named_buffers()})

    def add_linear(self, names: list[str], solved: Compensated, candidate: str = "") -> None:
        """Add linears of one scheme; the leading dimension of ``solved`` is ``len(names)``.

        ``candidate`` names the scheme among the candidates of an allocation.
        """
        for i, name in enumerate(names):
            self._put({f"{name}.{part}": tensor for part, tensor in code_tensors(solved.quantized, i).items()})
            self._put({f"{name}.{part}": tensor for part, tensor in side_tensors(solved, i).items()})
            shape, named = list(solved.quantized.codes[i].shape), {"scheme": candidate} if candidate else {}
            self.linears[name] = {"shape": shape, **side_entry(solved), **named}


def save_quantized(
    content: CheckpointContent, checkpoint: str | Path, manifest: str | Path, record: Mapping[str, Any]
) -> None:
    """Write the tensors, then the manifest with their sha256 and ``record`` (axes, versions,
    inputs)."""
    write_each(checkpoint, content.tensors, {})
    schemes = {
        name: scheme.to_dict() if scheme else None
        for name in ("weight", "key_value")
        for scheme in [getattr(content.schemes, name)]
    }
    if content.schemes.candidates:
        schemes["candidates"] = {name: scheme.to_dict() for name, scheme in content.schemes.candidates.items()}
    activations = {name: scheme.to_dict() for name, scheme in content.activations.items()}
    write_json(
        manifest,
        {
            **record,
            "status": "ok",
            "format_version": FORMAT_VERSION,
            "config": content.config,
            "schemes": schemes,
            "activations": activations,
            "rounded": list(content.schemes.linears),
            "linears": content.linears,
            "online": content.online,
            "sha256": sha256_of(checkpoint),
        },
    )


def save_failed(checkpoint: str | Path, manifest: str | Path, record: Mapping[str, Any], reason: str) -> None:
    """Write placeholders for a failed cell; readers report ``reason``."""
    write_tensors(checkpoint, {})
    write_json(manifest, {**record, "status": "failed", "reason": reason, "format_version": FORMAT_VERSION})


class PackedCheckpoint:
    """Packed checkpoint whose decoder layers are loaded one at a time into a transformers model.

    The loaded layers compute as the quantized model does: codes are dequantized once, activations
    are rounded in every forward pass.

    ``folder`` holds ``model.safetensors`` and ``quantgrid.json``. Raises :class:`ConfigError` for
    an incomplete or altered file, :class:`NumericalFailure` for the placeholder of a failed cell.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        manifest: str | Path | None = None,
    ):
        self.path, self.dtype, self.device = Path(folder) / "model.safetensors", dtype, device
        self.about = read_json(manifest or Path(folder) / "quantgrid.json")
        if self.about["status"] == "failed":
            raise NumericalFailure(self.about["reason"])
        if (version := self.about["format_version"]) != FORMAT_VERSION:
            raise ConfigError(
                f"{self.path}: checkpoint format {version}; accepted: {FORMAT_VERSION}. Quantize the model again"
            )
        if sha256_of(self.path) != self.about["sha256"]:
            raise ConfigError(
                f"{self.path}: sha256 differs from the one in its manifest; delete its folder and run again"
            )
        self.shape = shape_from_config(self.about["config"], str(self.path))

    def skeleton(self) -> nn.Module:
        """Model with embedding, lm_head and final norm, keys and values rounded if configured;
        empty layers."""
        model = skeleton(self.about["config"], self.read(*END_ROLES.values()), self.path, self.dtype, self.device)
        if self.about["schemes"]["key_value"]:
            round_key_values(model, KeyValueScheme.from_dict(self.about["schemes"]["key_value"]))
        return model

    def fill(self, index: int, layer: nn.Module) -> None:
        """Replace every linear of decoder layer ``index`` by a :class:`QuantizedLinear` and load
        its other tensors."""
        prefix, plan = LAYER_PREFIX.format(layer=index), self.shape.plan(index)
        tensors = {name: part.to(self.device) for name, part in self.read(prefix, site_name(index, "")).items()}
        for site in plan.sites.values():
            name = site_name(index, site.name)
            site_input = SiteInput(
                restored(name, self.about["online"].get(name, []), tensors, self.dtype),
                _rounding(name, self.about, tensors),
                site.together,
            )
            for linear in site.linears:
                module = plan.modules[linear]
                layer.set_submodule(module, self._linear(index, linear, tensors, site_input))
        fill(layer, prefix, tensors, self.dtype, self.device)
        require_filled(layer, prefix, self.path, tensors)
        layer.to(self.device)

    def _linear(self, index: int, linear: str, tensors: dict[str, Tensor], site_input: SiteInput) -> QuantizedLinear:
        module = module_name(self.shape, index, linear)
        packed = take_linear(module, self.about, tensors, self.weight_scheme(index, linear))
        bias, low_rank = packed.bias, packed.low_rank
        return QuantizedLinear(
            packed.dense(self.dtype),
            None if bias is None else bias.to(self.dtype),
            site_input,
            None if low_rank is None else (low_rank[0].to(self.dtype), low_rank[1].to(self.dtype)),
            packed.branch_input,
            self.is_rounded(linear),
        )

    def is_rounded(self, linear: str) -> bool:
        """Check whether the role ``linear`` is quantized: its kind is among those of the cell."""
        return kind_of(linear) in self.about["rounded"]

    @cached_property
    def schemes(self) -> CellSchemes:
        """Schemes of weights and of keys and values, with the allocation; activations are by site (``about``)."""
        stored, shape = self.about["schemes"], self.shape
        named = {
            linear_key(index, linear): entry["scheme"]
            for index in range(shape.layers)
            for linear in shape.plan(index).linears
            if "scheme" in (entry := self.about["linears"].get(module_name(shape, index, linear), {}))
        }
        found = CellSchemes.from_dict({**stored, "activation": {}, "linears": self.about["rounded"]})
        return replace(found, chosen=named, tied=is_tied(shape, named))

    def weight_scheme(self, index: int, linear: str) -> QuantScheme | None:
        """Scheme of the weight of a linear of decoder layer ``index``; None in full precision."""
        return self.schemes.weight_of(index, linear)

    def names(self) -> set[str]:
        """Names of the stored tensors."""
        with open_tensors(self.path) as file:
            return set(file.keys())

    def read(self, *prefixes: str) -> dict[str, Tensor]:
        """Stored tensors whose names begin with one of ``prefixes``."""
        with open_tensors(self.path) as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118 (not a mapping)


def load_quantized(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    manifest: str | Path | None = None,
) -> nn.Module:
    """Load a :class:`PackedCheckpoint` whole, as a transformers model."""
    return whole(PackedCheckpoint(folder, dtype, device, manifest))


def load_full_precision(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load the unmodified model of a canonical folder whole, as a canonical transformers model."""
    settle(folder)
    return whole(FullPrecision(folder, dtype, device))


def whole(source: Source) -> nn.Module:
    """Model of ``source`` with all layers loaded."""
    model = source.skeleton()
    for index, layer in enumerate(model.model.layers):
        source.fill(index, layer)
    return model.eval()


def _rounding(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rounding | None:
    """Rounding of the input of site ``name``; None if it stays in full precision."""
    if name not in about["activations"]:
        return None
    fixed = {part: tensors[f"{name}.{part}"] for part in (*PARAMETERS, *CLIP) if f"{name}.{part}" in tensors}
    return Rounding(QuantScheme.from_dict(about["activations"][name]), fixed)
