"""Packed checkpoints: 4-bit codes two to a byte, scales in their own dtype, and a manifest that says how to run them.

``model.safetensors`` holds per linear ``{name}.codes``, ``.scale`` and, where a scheme has them, ``.zero_point``, ``.global_scale``,
``.codebook``, and what ``compensation_storage.py`` lists (low-rank factors, outliers); scales and zero points of fewer than 8 bits are
packed as codes are; the tensors of the online operations as ``{site}.online.{number}.{name}``; all other tensors under their own names.
``quantgrid.json`` holds the model's config, the schemes (``activations`` per site), the names of the linears that they are for (``rounded``), the
shapes of the linears, the online operations, and the sha256 of the tensors' file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import END_ROLES, LAYER_PREFIX, SITES, linear_module
from .calibration import site_name
from .cell_schemes import CellSchemes, KeyValueScheme
from .compensation_storage import read_low_rank, side_entry, side_tensors, with_outliers
from .errors import ConfigError, NumericalFailure
from .key_values import round_key_values
from .linear import CLIP, QuantizedLinear, Rounding, SiteInput
from .mitigations.compensated import Compensated
from .online import restored, stored
from .packing import pack, unpack
from .quantizer import QuantizedTensor, QuantScheme
from .skeletons import fill, require_filled, skeleton
from .storage import open_tensors, read_json, settle, sha256_of, write_json, write_tensors
from .tensor_files import write_each

FORMAT_VERSION = 4
PARAMETERS = ("scale", "zero_point", "global_scale", "codebook")


def bare_name(layer: int, linear: str) -> str:
    """Module name of a linear, such as ``model.layers.0.self_attn.q_proj``."""
    return LAYER_PREFIX.format(layer=layer) + linear_module(linear)


@dataclass
class CheckpointContent:
    """What a checkpoint will hold, while layers are added to it; ``tensors`` may be a ``tensor_files.TensorSpool``."""

    config: Mapping[str, Any]
    schemes: CellSchemes
    activations: dict[str, QuantScheme] = field(default_factory=dict)
    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    online: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add_plain(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Tensors kept as they are: norms and biases in float32, embeddings in bfloat16."""
        self.tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    def add_ends(self, ends: Mapping[str, Tensor]) -> None:
        """Embedding and lm_head in bfloat16, the final norm in float32; a lm_head that is tied to the embedding is left out."""
        for role, tensor in ends.items():
            self.add_plain({END_ROLES[role]: tensor}, torch.float32 if role == "final_norm" else torch.bfloat16)
        self.config = {**self.config, "tie_word_embeddings": "lm_head" not in ends}

    def add_site(self, layer: int, site: str, online: list[dict[str, Any]], rounding: Rounding | None) -> None:
        """Online operations of a site, and the scheme that rounds its input with what calibration fixed of it."""
        name = site_name(layer, site)
        if online:
            self.online[name], tensors = stored(name, online)
            self.tensors.update(tensors)
        if rounding is not None:
            self.activations[name] = rounding.scheme
            self.tensors.update({f"{name}.{part}": tensor for part, tensor in rounding.named_buffers()})

    def add_linear(self, names: list[str], solved: Compensated) -> None:
        """One linear of several layers: ``solved`` has a leading dimension as long as ``names``."""
        parts, packed = _parts(solved.quantized), _packed_bits(self.schemes.weight)
        for i, name in enumerate(names):
            self.tensors[f"{name}.codes"] = pack(solved.quantized.codes[i], self.schemes.weight.element_format.bits)
            self.tensors.update({f"{name}.{part}": pack(tensor[i].flatten(), packed[part]) if part in packed else tensor[i]
                                 for part, tensor in parts.items()})
            self.tensors.update({f"{name}.{part}": tensor for part, tensor in side_tensors(solved, i).items()})
            self.linears[name] = {"shape": list(solved.quantized.codes[i].shape), **side_entry(solved)}


def _parts(quantized: QuantizedTensor) -> dict[str, Tensor]:
    parts = {name: getattr(quantized, name) for name in PARAMETERS}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def _packed_bits(scheme: QuantScheme) -> dict[str, int]:
    """Scales and zero points that are packed, all of a linear in one run, with their bits: codes of fewer than 8."""
    bits = {"scale": scheme.storage.bits, "zero_point": scheme.zero_point_bits}
    return {part: width for part, width in bits.items() if 0 < width < 8}


def save_quantized(content: CheckpointContent, checkpoint: str | Path, manifest: str | Path, record: Mapping[str, Any]) -> None:
    """Write tensors, then the manifest with their sha256; ``record`` (axes, versions, inputs) is kept in the manifest."""
    write_each(checkpoint, content.tensors, {})
    schemes = {name: scheme.to_dict() if scheme else None for name in ("weight", "key_value")
               for scheme in [getattr(content.schemes, name)]}
    activations = {name: scheme.to_dict() for name, scheme in content.activations.items()}
    write_json(manifest, {**record, "status": "ok", "format_version": FORMAT_VERSION, "config": content.config, "schemes": schemes,
                          "activations": activations, "rounded": list(content.schemes.linears), "linears": content.linears,
                          "online": content.online, "sha256": sha256_of(checkpoint)})


def save_failed(checkpoint: str | Path, manifest: str | Path, record: Mapping[str, Any], reason: str) -> None:
    """Stand-ins for a cell whose arithmetic broke down: what reads them passes ``reason`` on."""
    write_tensors(checkpoint, {})
    write_json(manifest, {**record, "status": "failed", "reason": reason, "format_version": FORMAT_VERSION})


class PackedCheckpoint:
    """A packed checkpoint whose decoder layers are read one at a time, each into a layer of a transformers model that computes as the quantized
    one does: codes dequantized once, activations rounded on the way.

    ``folder`` holds ``model.safetensors`` and ``quantgrid.json``. Raises :class:`ConfigError` for a file that is not whole or was
    altered, :class:`NumericalFailure` for the stand-in of a failed cell.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                 manifest: str | Path | None = None):
        self.path, self.dtype, self.device = Path(folder) / "model.safetensors", dtype, device
        self.about = read_json(manifest or Path(folder) / "quantgrid.json")
        if self.about["status"] == "failed":
            raise NumericalFailure(self.about["reason"])
        if (version := self.about["format_version"]) != FORMAT_VERSION:
            raise ConfigError(f"{self.path}: written in format {version}, this version reads {FORMAT_VERSION}; quantize it again")
        if sha256_of(self.path) != self.about["sha256"]:
            raise ConfigError(f"{self.path}: its sha256 is not the one in its manifest; delete its folder and run again")

    def _read(self, *prefixes: str) -> dict[str, Tensor]:
        with open_tensors(self.path) as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118 (not a mapping)

    def skeleton(self) -> nn.Module:
        """The model with its ends, keys and values rounded if they are to be; its decoder layers are empty."""
        model = skeleton(self.about["config"], self._read(*END_ROLES.values()), self.path, self.dtype, self.device)
        if self.about["schemes"]["key_value"]:
            round_key_values(model, KeyValueScheme.from_dict(self.about["schemes"]["key_value"]))
        return model

    def fill(self, index: int, layer: nn.Module) -> None:
        """Put a :class:`QuantizedLinear` in the place of every linear of the decoder layer ``index``, and what it holds besides."""
        prefix = LAYER_PREFIX.format(layer=index)
        tensors = self._read(prefix, site_name(index, ""))
        for site, linears in SITES.items():
            name = site_name(index, site)
            site_input = SiteInput(restored(name, self.about["online"].get(name, []), tensors, self.dtype), _rounding(name, self.about, tensors),
                                   len(linears))
            for linear in linears:
                layer.set_submodule(linear_module(linear), self._linear(bare_name(index, linear), linear, tensors, site_input))
        fill(layer, prefix, tensors, self.dtype, self.device)
        require_filled(layer, prefix, self.path)
        layer.to(self.device)

    def _linear(self, module: str, linear: str, tensors: dict[str, Tensor], site_input: SiteInput) -> QuantizedLinear:
        rounded, weights = linear in self.about["rounded"], self.about["schemes"]["weight"]
        weight, low_rank = _weight(module, self.about, tensors, QuantScheme.from_dict(weights) if weights and rounded else None, self.dtype)
        bias = tensors.get(f"{module}.bias")
        term = self.about["linears"].get(module, {}).get("low_rank")
        fed = term["input"] if term else "quantized"
        return QuantizedLinear(weight, None if bias is None else bias.to(self.dtype), site_input, low_rank, fed, rounded)


def load_quantized(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                   manifest: str | Path | None = None) -> nn.Module:
    """The transformers model of a :class:`PackedCheckpoint`, all of it in memory."""
    packed = PackedCheckpoint(folder, dtype, device, manifest)
    model = packed.skeleton()
    for index, layer in enumerate(model.model.layers):
        packed.fill(index, layer)
    return model.eval()


def load_full_precision(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """The unmodified model of a canonical folder, as transformers runs it, all of it in memory."""
    from transformers import AutoModelForCausalLM

    settle(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    return model.to(device).eval()


def _rounding(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rounding | None:
    """How the input of the site ``name`` is rounded; None where it stays in full precision."""
    if name not in about["activations"]:
        return None
    fixed = {part: tensors[f"{name}.{part}"] for part in (*PARAMETERS, *CLIP) if f"{name}.{part}" in tensors}
    return Rounding(QuantScheme.from_dict(about["activations"][name]), fixed)


def _weight(name: str, about: Mapping[str, Any], tensors: dict[str, Tensor], scheme: QuantScheme | None,
            dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(dequantized weight, low-rank factors or None) of one linear."""
    if scheme is None:
        return tensors.pop(f"{name}.weight").to(dtype), None
    shape = tuple(about["linears"][name]["shape"])
    parts = {part: tensors.pop(f"{name}.{part}", None) for part in ("codes", *PARAMETERS)}
    parts["codes"] = unpack(parts["codes"], scheme.element_format.bits, shape, signed=scheme.code_range[0] < 0)
    for part, bits in _packed_bits(scheme).items():
        scale_shape = scheme.scale_shape(shape)
        parts[part] = unpack(parts[part], bits, (math.prod(scale_shape),), signed=False).reshape(scale_shape)
    entry = about["linears"][name]
    weight = with_outliers(name, entry, tensors, QuantizedTensor(scheme=scheme, dtype=torch.float32, **parts).dequantize())
    return weight.to(dtype), read_low_rank(name, entry, tensors, dtype)
