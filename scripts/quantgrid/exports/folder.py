"""Exported folders: staged beside their place, weights in shards, files of the model copied.

A folder appears under its name when it is complete. Memory holds one decoder layer, or the ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ground.errors import ConfigError
from ..ground.storage import read_json, sha256_of, write_json, write_text
from ..ground.tensor_files import TensorSpool, write_each
from ..models.folders import INDEX, TOKENIZER_FILES
from ..models.shapes import ModelShape
from .adapter import FOLDER as ADAPTER_FOLDER
from .adapter import Adapter
from .compressed_formats import FLOAT, INTEGER, MXFP8, weight_format
from .features import Features
from .packed_cell import ExportLayer, PackedCell
from .packer import Packer

SHARD_BYTES = 5 * 10**9
REJECTED = ".rejected"
COPIED = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_SCALE_BYTES, _MARGIN = 4, 1.1  # of a stored scale at most; of the estimate


def require_absent(out: Path) -> None:
    """Raise :class:`ConfigError` if the place of an export is taken."""
    for taken in (out, out.with_name(out.name + REJECTED)):
        if taken.exists() or taken.is_symlink():
            raise ConfigError(f"OUT: {taken} exists already; delete it or name another folder")


def require_disk(out: Path, needed: int) -> None:
    """Raise :class:`ConfigError` if the file system of ``out`` has less than ``needed`` bytes free."""
    parent = next(place for place in out.absolute().parents if place.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(f"OUT: {out} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {parent}")


def bytes_needed(features: Features, target: str, shard: int = SHARD_BYTES) -> int:
    """Upper bound of the bytes that an export takes while it is written: weights, and one shard twice."""
    weight, shape = features.schemes.weight, features.shape
    per_weight = 4.0
    if target != "dense" and weight is not None:
        activation = next((found[0] for found in features.schemes.activation.values() if found), None)
        name = weight_format(weight, activation) if target == "compressed-tensors" else None
        bits = 8 if name in (INTEGER, FLOAT, MXFP8) else weight.element_format.bits
        per_weight = bits / 8 + 2 * _SCALE_BYTES / (weight.group_size or shape.hidden_size)
    total = _linear_elements(shape) * per_weight + 2 * shape.vocabulary * shape.hidden_size * 4
    total += _matrix_elements(features) * 4
    return int(_MARGIN * (total + min(total, shard)))


def _linear_elements(shape: ModelShape) -> int:
    sizes = ((shape.linear_size(name), count) for plan, count in shape.plans() for name in plan.linears)
    return sum(rows * columns * count for (rows, columns), count in sizes)


def _matrix_elements(features: Features) -> int:
    """Elements of the matrices of online rotations, at most: one of the input's size per linear."""
    rotated = [site for site, operations in features.online.items() if operations]
    return sum(
        count * features.shape.site_size(name) ** 2 * len(plan.sites[name].linears)
        for plan, count in features.shape.plans()
        for name in plan.sites_of(rotated)
    )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``; rename it to ``out`` at the end, delete it after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        require_absent(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reject(folder: Path, out: Path) -> Path:
    """Move a staged folder to ``out`` + ``.rejected`` for inspection; returns its place."""
    place = out.with_name(out.name + REJECTED)
    folder.rename(place)
    return place


class Shards:
    """Safetensors files of a folder, filled in any order, of at most ``limit`` bytes each (a single
    tensor may be larger)."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES):
        self.folder, self.limit = folder, limit
        self.spool, self.bytes, self.total = TensorSpool(folder), 0, 0
        self.names: list[list[str]] = []

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors; a full shard is written."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.dtype.itemsize
            if self.bytes and self.bytes + size > self.limit:
                self._write()
            self.spool[name] = tensor
            self.bytes, self.total = self.bytes + size, self.total + size

    def _write(self) -> None:
        write_each(self.folder / _part(len(self.names)), self.spool, {}, format="pt")
        self.names.append(list(self.spool))
        self.spool, self.bytes = TensorSpool(self.folder), 0

    def close(self) -> None:
        """Write the last shard, give all their names, and write the index of more than one."""
        self._write()
        count = len(self.names)
        files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        files = files if count > 1 else ["model.safetensors"]
        for number, file in enumerate(files):
            (self.folder / _part(number)).rename(self.folder / file)
        if count > 1:
            places = {name: file for file, names in zip(files, self.names) for name in names}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": places})


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


class _Bits:
    """Stored bits of the rounded linears of a cell."""

    def __init__(self) -> None:
        self.elements, self.bits = 0, 0.0

    def add(self, layer: ExportLayer) -> None:
        for linear in layer.linears:
            if linear.quantized is not None:
                count = linear.quantized.codes.numel()
                self.elements, self.bits = self.elements + count, self.bits + linear.quantized.bits() * count

    @property
    def mean(self) -> float | None:
        return self.bits / self.elements if self.elements else None


def write_folder(
    cell: PackedCell, packer: Packer, model: Path, folder: Path, name: str, shard: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write weights, config and the files of ``model`` into ``folder``.

    ``name`` is that of the finished export. Returns ``bits_per_weight`` of the rounded linears,
    ``bytes`` of the tensors and the ``files`` written beside the model's own.
    """
    packer.prepare(cell)
    shards, bits, adapter = Shards(folder, shard), _Bits(), Adapter(folder)
    shards.put(packer.plain(cell.ends()))
    for index in range(cell.shape.layers):  # without a name for the layer, which goes before the next comes
        _add_layer(cell.layer(index), packer, shards, bits, adapter)
    shards.close()
    if adapter.ranks:
        adapter.write(folder / ADAPTER_FOLDER, name)
    write_json(folder / "config.json", {**packer.architecture(dict(cell.config)), **packer.config()})
    for file, text in packer.files().items():
        write_text(folder / file, text)
    copy_files(model, folder)
    return {"bits_per_weight": bits.mean, "bytes": shards.total, "adapter": bool(adapter.ranks)}


def _add_layer(layer: ExportLayer, packer: Packer, shards: Shards, bits: _Bits, adapter: Adapter) -> None:
    shards.put(packer.layer(layer))
    bits.add(layer)
    if packer.has_adapter:
        adapter.add(layer)


def copy_files(model: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and licences of ``model`` into ``folder``."""
    for path in [model / name for name in COPIED]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    copy_licenses(model, folder)
    if not (folder / "generation_config.json").is_file():
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        ids = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
        if ids:
            write_json(folder / "generation_config.json", ids)


def copy_licenses(model: Path, folder: Path) -> None:
    """Copy the licences of ``model`` into ``folder``."""
    for path in [path for pattern in _LICENSES for path in sorted(model.glob(pattern))]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, by its path below it."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
