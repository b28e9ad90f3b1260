"""Stored form of low-rank factors, outliers and residual columns of a linear, and their bits.

Tensors of a linear, below its name:

``left``, ``right``                 factors in bfloat16, (m, r) and (r, n)
``left_codes``, ``right_codes``     factors as packed codes of 8 or 4 bits; the left one
                                    transposed: (r, m) and (r, n)
``left_scale``, ``right_scale``     their scales, (r, 1) float32
``outlier_values``                  bfloat16 (count,), row by row, columns ascending
``outlier_columns``                 their columns, 16 bits each
``outlier_counts``                  number of outliers per row, (m,), 16 bits each
``residual.0.codes``, ...           parts of the residual columns (m, ·), each as any quantized
                                    tensor (``code_storage.py``)
``residual_columns``                their columns, (r,), 16 bits each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ground.errors import ConfigError
from ..quantizer.packing import pack, unpack
from ..quantizer.quantized_weight import Compensated, Outliers
from ..quantizer.tensors import QuantizedTensor
from ..schemes.quant_scheme import QuantScheme
from .code_storage import code_tensors, stored_bits, take_codes

SIDES = ("left", "right")
LARGEST_SHORT = 65535


def side_tensors(solved: Compensated, layer: int) -> dict[str, Tensor]:
    """Stored tensors of one layer of ``solved``, whose batch dimension is the layers."""
    found: dict[str, Tensor] = {}
    if solved.factors is not None:
        for side, factor in zip(SIDES, solved.factors):
            found |= {
                f"{side}_codes": pack(factor.codes[layer], factor.scheme.element_format.bits),
                f"{side}_scale": factor.scale[layer],
            }
    elif solved.low_rank is not None:
        found |= {side: factor[layer] for side, factor in zip(SIDES, solved.low_rank)}
    if solved.residual is not None:
        _require_short(solved.quantized.codes.shape[-1])
        for number, part in enumerate(solved.residual.parts):
            found |= {f"residual.{number}.{name}": tensor for name, tensor in code_tensors(part, layer).items()}
        found["residual_columns"] = _short(solved.residual.columns[layer])
    return found | (
        _outlier_tensors(solved.outliers, layer, solved.quantized.codes.shape[-2:]) if solved.outliers else {}
    )


def side_entry(solved: Compensated) -> dict[str, Any]:
    """Manifest entry: rank, scheme (None: bfloat16) and input of the factors; whether outliers
    exist; number and scheme of each part of residual columns, if there are any."""
    term = None
    if solved.low_rank is not None:
        scheme = solved.factors[0].scheme.to_dict() if solved.factors else None
        term = {"rank": solved.low_rank[1].shape[-2], "factors": scheme, "input": solved.branch_input}
    entry: dict[str, Any] = {"low_rank": term, "outliers": solved.outliers is not None}
    if solved.residual is not None:
        entry["residual"] = [
            {"columns": part.codes.shape[-1], "scheme": part.scheme.to_dict()} for part in solved.residual.parts
        ]
    return entry


def side_bits(solved: Compensated) -> float:
    """Stored bits per weight of one linear of ``solved`` in addition to codes and scheme
    parameters."""
    m, n = solved.quantized.codes.shape[-2:]
    bits = 0.0
    if solved.factors is not None:
        bits += sum(
            factor.codes.shape[-2:].numel() * factor.scheme.bits_per_element(factor.codes.shape[-2:])
            for factor in solved.factors
        )
    elif solved.low_rank is not None:
        bits += 16 * solved.low_rank[1].shape[-2] * (m + n)
    if solved.outliers is not None:
        bits += 32 * solved.outliers.values.shape[-1] + 16 * m
    if solved.residual is not None:
        bits += residual_bits(m, [(part.codes.shape[-1], part.scheme) for part in solved.residual.parts])
    return bits / (m * n)


def residual_bits(rows: int, parts: Sequence[tuple[int, QuantScheme]]) -> int:
    """Stored bits of residual columns of ``rows`` rows, by (columns, scheme) of their parts."""
    return sum(16 * columns + stored_bits((rows, columns), scheme) for columns, scheme in parts)


def read_low_rank(
    name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """(left (m, r), right (r, n)) of linear ``name`` in ``dtype``; None without a low-rank term."""
    term = entry["low_rank"]
    if term is None:
        return None
    if term["factors"] is None:
        return tuple(tensors.pop(f"{name}.{side}").to(dtype) for side in SIDES)
    scheme, factors = QuantScheme.from_dict(term["factors"]), []
    for side, length in zip(SIDES, entry["shape"]):
        shape = (term["rank"], length)
        codes = unpack(
            tensors.pop(f"{name}.{side}_codes"), scheme.element_format.bits, shape, signed=scheme.code_range[0] < 0
        )
        stored = QuantizedTensor(codes, tensors.pop(f"{name}.{side}_scale"), None, None, scheme, torch.float32)
        factors.append(stored.dequantize().to(dtype))
    return factors[0].mT.contiguous(), factors[1]


def take_outliers(
    name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Outliers of linear ``name``, removed from ``tensors``: values, rows and columns (count,); None
    without any."""
    if not entry["outliers"]:
        return None
    values, columns, counts = (tensors.pop(f"{name}.outlier_{part}") for part in ("values", "columns", "counts"))
    rows = torch.arange(len(counts), device=counts.device)
    return values, torch.repeat_interleave(rows, _unsigned(counts)), _unsigned(columns)


def take_residual(name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Residual columns of linear ``name``, removed from ``tensors``: values (m, r) and columns (r,); None
    without any."""
    if "residual" not in entry:
        return None
    values = [
        take_codes(
            f"{name}.residual.{number}",
            (entry["shape"][0], part["columns"]),
            tensors,
            QuantScheme.from_dict(part["scheme"]),
        ).dequantize()
        for number, part in enumerate(entry["residual"])
    ]
    return torch.cat(values, -1), _unsigned(tensors.pop(f"{name}.residual_columns"))


def _outlier_tensors(outliers: Outliers, layer: int, shape: torch.Size) -> dict[str, Tensor]:
    _require_short(shape[-1])
    positions = outliers.positions[layer]
    counts = torch.bincount(positions // shape[-1], minlength=shape[-2])
    return {
        "outlier_values": outliers.values[layer],
        "outlier_columns": _short(positions % shape[-1]),
        "outlier_counts": _short(counts),
    }


def _require_short(inputs: int) -> None:
    """Raise :class:`ConfigError` for more ``inputs`` than 16 bits number."""
    if inputs > LARGEST_SHORT:
        raise ConfigError(
            f"outliers of a linear with {inputs} inputs cannot be stored: column indices have 16 bits, "
            f"so at most {LARGEST_SHORT} inputs are accepted"
        )


def _short(values: Tensor) -> Tensor:
    """Integers from 0 to 65535 as the 16 bits of an int16 (torch supports few operations on
    uint16)."""
    return torch.where(values > 32767, values - 65536, values).to(torch.int16)


def _unsigned(short: Tensor) -> Tensor:
    return short.to(torch.int64) & 0xFFFF
