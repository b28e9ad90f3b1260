"""Models stored in MXFP4, dequantized once to bfloat16, which holds the numbers exactly.

A weight of all experts is two tensors in the files (OCP Microscaling v1.0, layout of GPT-OSS):
``{name}_blocks`` (experts, m, groups, 16), two codes per byte with the first in the lower half, and
``{name}_scales`` (experts, m, groups), exponents of two plus 127. The model has ``{name}`` (experts, n, m).
Headers are read with the standard library only, while the workflow is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ground.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("mxfp4",)  # accepted by ``dequantize`` of a model's config entry
BLOCKS, SCALES = "_blocks", "_scales"
_CODES_PER_BYTE, _BIAS = 2, 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, by code without sign


def packed_names(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the weights that are stored in MXFP4."""
    found = [name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)]
    return [name for name in found if name + SCALES in tensors]


def dequantized_headers(tensors: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """Tensor headers of a model in MXFP4 as they are after :func:`write_dequantized`.

    Raises :class:`ConfigError`, naming ``where``, if no tensor or a tensor of another layout is in MXFP4.
    """
    names = packed_names(tensors)
    if not names:
        raise ConfigError(f"{where}: no tensor of this model is stored in MXFP4; leave out 'dequantize'")
    found = {name: dict(tensor) for name, tensor in tensors.items()}
    for name in names:
        blocks, scales = found.pop(name + BLOCKS), found.pop(name + SCALES)
        size, groups = blocks["shape"], scales["shape"]
        if blocks["dtype"] != "U8" or scales["dtype"] != "U8" or len(size) != 4 or size[:3] != groups:
            raise ConfigError(
                f"{where}: '{name:.80}{BLOCKS}' is {blocks['dtype']} {tuple(size)} with scales {scales['dtype']} "
                f"{tuple(groups)}; accepted are U8 (experts, m, groups, 16) and (experts, m, groups)"
            )
        shape = [size[0], size[2] * size[3] * _CODES_PER_BYTE, size[1]]
        found[name] = {"dtype": "BF16", "shape": shape, "file": blocks["file"]}
    return found


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """Weight (experts, n, m) in bfloat16 of ``blocks`` (experts, m, groups, 16) and ``scales`` (experts, m,
    groups), both uint8."""
    import torch

    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = torch.ldexp(table[codes.int()], (scales.int() - _BIAS).unsqueeze(-1))
    return values.flatten(-2).mT.to(torch.bfloat16)


def write_dequantized(files: list[Path], target: Path) -> None:
    """Write the tensors of ``files`` to one safetensors file, those in MXFP4 dequantized one expert at a time."""
    import torch

    from ..ground.storage import open_tensors
    from ..ground.tensor_files import writing

    places = {name: file for file in files for name in _names(file)}
    packed = packed_names(places)
    parts = {name + part for name in packed for part in (BLOCKS, SCALES)}
    plain = [name for name in places if name not in parts]

    def read(name: str) -> Tensor:
        with open_tensors(places[name]) as file:
            return file.get_tensor(name)

    declared = {name: read(name).to("meta") for name in plain}
    for name in packed:
        experts, m, groups, width = read(name + BLOCKS).shape
        size = (experts, groups * width * _CODES_PER_BYTE, m)
        declared[name] = torch.empty(size, dtype=torch.bfloat16, device="meta")
    with writing(target, declared, {}, format="pt") as put:
        for name in plain:
            put(name, read(name))
        for name in packed:
            pairs = zip(read(name + BLOCKS), read(name + SCALES))
            put(name, torch.stack([dequantized(blocks, scales) for blocks, scales in pairs]))


def _names(file: Path) -> list[str]:
    from ..ground.storage import tensor_names

    return list(tensor_names(file))
