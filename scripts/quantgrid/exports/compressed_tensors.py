"""compressed-tensors folders: codes and scales as its compressors store them, and quantization_config.

Layouts are those of compressed-tensors 0.20 (``compressors/``). Global scales are stored as divisors.
Symmetric and asymmetric integers have signed codes and zero points.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantizer.packing import pack
from ..quantizer.scales import effective_step
from ..quantizer.tensors import QuantizedTensor
from ..schemes.quant_scheme import QuantScheme
from .compressed_formats import (
    FLOAT,
    INTEGER,
    MXFP8,
    NVFP4,
    PACKED,
    weight_format,
)
from .packed_cell import ExportLayer, SiteState, by_rows
from .packer import Packer
from .rotations import Rotations
from .words import signed_codes, unsigned_codes, words, words_down

VERSION = "0.17.0"  # of compressed-tensors: the oldest that knows every key written


class CompressedTensors(Packer):
    """Packer of compressed-tensors folders; one config group per pair of schemes."""

    has_adapter = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.groups: dict[tuple[str, QuantScheme, QuantScheme | None], list[str]] = {}
        self.ignored: list[str] = []
        self.rotations = Rotations(self.dtype)

    def linears(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Codes and scales of the linears of a layer; full precision where the cell has it."""
        found: dict[str, Tensor] = {}
        for linear in layer.joined:
            site = layer.sites[layer.site_of[linear.name]]
            found |= self.rotations.tensors(linear, site.online)
            if linear.quantized is None:
                self.ignored.append(linear.name)
                found[f"{linear.name}.weight"] = linear.weight.to(self.dtype)  # type: ignore[union-attr]
                continue
            quantized = by_rows(linear.quantized)
            name = weight_format(quantized.scheme, site.scheme)
            assert name is not None, linear.name
            self.groups.setdefault((name, quantized.scheme, site.scheme), []).append(linear.name)
            parts = {**weight_tensors(quantized, name, self.dtype), **input_tensors(site, self.dtype)}
            found |= {f"{linear.name}.{part}": tensor for part, tensor in parts.items()}
        return found

    def config(self) -> dict[str, Any]:
        """``quantization_config``, and the description of online rotations."""
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if self._is_uniform() else self._patterns(names),
                "weights": weight_arguments(weight, name),
                "input_activations": None if activation is None else input_arguments(activation),
                "output_activations": None,
                "format": name,
            }
            for number, ((name, weight, activation), names) in enumerate(self.groups.items())
        }
        formats = {group["format"] for group in groups.values()}
        described = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "version": VERSION,
            "config_groups": groups,
            "ignore": ["lm_head", *self._patterns(self.ignored)],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return {"quantization_config": {**described, **self.rotations.transform_config()}, **self.rotations.marker()}

    def files(self) -> dict[str, str]:
        """``{folder}/load.py`` of a folder with online rotations."""
        return self.rotations.files()

    def _is_uniform(self) -> bool:
        return len(self.groups) == 1

    def _patterns(self, names: list[str]) -> list[str]:
        """Targets that match ``names``: a pattern per linear where all layers agree, else the names."""
        every = [*self.ignored, *(name for held in self.groups.values() for name in held)]
        found: dict[str, None] = {}
        for name in names:
            suffix = name.split(".", 3)[3]
            alike = sum(other.endswith(f".{suffix}") for other in names)
            whole = alike == sum(other.endswith(f".{suffix}") for other in every)
            found[f"re:.*{suffix.replace('.', '[.]')}$" if whole else name] = None
        return list(found)


def weight_tensors(quantized: QuantizedTensor, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a linear (m, n) in the format ``name``, by their names below the linear.

    ``dtype`` is that of the scales of packed integers.
    """
    if name == PACKED:
        return _packed(quantized, dtype)
    if name == INTEGER:
        return _integers(quantized)
    if name == FLOAT:
        return {"weight": quantized.codes.view(torch.float8_e4m3fn), "weight_scale": _steps(quantized)}
    if name == MXFP8:
        return {"weight": quantized.codes.view(torch.float8_e4m3fn), "weight_scale": quantized.scale}
    found = {
        "weight_packed": pack(quantized.codes, quantized.scheme.element_format.bits),
        "weight_scale": quantized.scale,
    }
    if name == NVFP4:
        found["weight_global_scale"] = (1 / quantized.global_scale).float().reshape(1)  # type: ignore[operator]
    return found


def _steps(quantized: QuantizedTensor) -> Tensor:
    """Effective scales (m, groups), float32."""
    return effective_step(quantized.parameters, quantized.scheme).contiguous()


def _packed(quantized: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    bits = quantized.scheme.element_format.bits
    found = {
        "weight_packed": words(unsigned_codes(quantized), bits),
        "weight_scale": _steps(quantized).to(dtype),
        "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if quantized.zero_point is not None:
        found["weight_zero_point"] = words_down(quantized.zero_point, bits)
    return found


def _integers(quantized: QuantizedTensor) -> dict[str, Tensor]:
    bits = quantized.scheme.element_format.bits
    found = {"weight": signed_codes(unsigned_codes(quantized), bits), "weight_scale": _steps(quantized)}
    if quantized.zero_point is not None:
        found["weight_zero_point"] = signed_codes(quantized.zero_point, bits)
    return found


def input_tensors(site: SiteState, dtype: torch.dtype) -> dict[str, Tensor]:
    """Calibrated parameters of the input of a linear, by their names below the linear."""
    if site.scheme is None or not site.fixed:
        return {}
    if "scale" not in site.fixed:
        return {"input_global_scale": (1 / site.fixed["global_scale"]).float().reshape(1)}
    found = {"input_scale": site.fixed["scale"].float().reshape(1)}
    if "zero_point" in site.fixed:
        bits = site.scheme.element_format.bits
        found["input_zero_point"] = signed_codes(site.fixed["zero_point"], bits).reshape(1)
    return found


def _arguments(scheme: QuantScheme, strategy: str, dynamic: bool | str) -> dict[str, Any]:
    element = scheme.element_format
    found: dict[str, Any] = {
        "num_bits": element.bits,
        "type": "int" if element.kind == "integer" else "float",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "dynamic": dynamic,
    }
    if scheme.group_size:
        found["group_size"] = scheme.group_size
    if element.kind == "float" and scheme.scale_format == "e8m0":
        found["scale_dtype"] = "torch.uint8"
    if strategy == "tensor_group":
        found["scale_dtype"] = "torch.float8_e4m3fn"
    return found


def weight_arguments(scheme: QuantScheme, name: str) -> dict[str, Any]:
    """``weights`` of a config group in the format ``name``."""
    strategy = "tensor_group" if name == NVFP4 else scheme.granularity
    return _arguments(scheme, strategy, False)


def input_arguments(scheme: QuantScheme) -> dict[str, Any]:
    """``input_activations`` of a config group."""
    if scheme.granularity == "tensor":
        return _arguments(scheme, "tensor", False)
    if scheme.global_scale == "static":
        return _arguments(scheme, "tensor_group", "local")
    return _arguments(scheme, "token" if scheme.granularity == "channel" else "group", True)
