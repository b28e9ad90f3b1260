"""Safetensors files written tensor by tensor in any order, and a file-backed dict of tensors.

Memory holds one tensor at a time. A safetensors file (https://huggingface.co/docs/safetensors)
begins with the offsets of all tensors, so their dtypes and shapes are declared first (by meta
tensors if there is no data yet). The bytes equal those that ``safetensors`` would write.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from .storage import replacing

# Dtype names in the order of the safetensors layout: wide elements first, so that all are aligned.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # bytes, of a tensor in a spool


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def digest_of(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE3 of a state: its JSON, then name and bytes of each tensor."""
    digest = blake3(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes_of(tensors[name]))  # type: ignore[arg-type]
    return digest.hexdigest()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and offsets of every tensor, in file order."""
    order, found, start = list(_DTYPES), {}, 0
    described = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    for name in sorted(described, key=lambda name: (order.index(described[name][0]), name)):
        dtype, shape = described[name]
        end = start + dtype.itemsize * torch.Size(shape).numel()
        found[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    return found


@contextmanager
def writing(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], **labels: str
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a file of ``tensors``, of which only names, dtypes and shapes are used.

    ``metadata`` is stored as in ``storage.write_tensors``, ``labels`` as they are. Yields a function
    (name, tensor) that writes one tensor. The file is renamed to ``path`` at the end. Raises :class:`ValueError` for a
    tensor that differs from its declaration, and at the end for a missing one.
    """
    layout = _layout(tensors)
    header = {"__metadata__": {**labels, "quantgrid": json.dumps(metadata, sort_keys=True)}, **layout}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    missing = dict.fromkeys(layout)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def put(name: str, tensor: Tensor) -> None:
            place = layout[name]
            if (_DTYPES[tensor.dtype], list(tensor.shape)) != (place["dtype"], place["shape"]):
                raise ValueError(
                    f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"declared as {place['dtype']} {place['shape']}"
                )
            file.seek(8 + len(text) + place["data_offsets"][0])
            file.write(_bytes_of(tensor))  # type: ignore[arg-type]
            missing.pop(name, None)

        yield put
        if missing:
            raise ValueError(
                f"{path}: tensor {next(iter(missing))} was declared and not written ({len(missing)} in all)"
            )


def write_each(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], **labels: str) -> None:
    """Write all ``tensors``, reading one at a time from the mapping."""
    with writing(path, tensors, metadata, **labels) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


class TensorSpool(MutableMapping[str, Tensor]):
    """Named tensors in a file of ``folder``: an unnamed one that is deleted with the process, or
    ``name``, which stays.

    Reading a tensor maps it: its pages load on access and are freed with the tensor. Replacing one
    leaves the old bytes in the file.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO
        if name is None:
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it is open as long as the spool is there)
        else:
            Path(folder, name).touch()
            self.file = open(Path(folder, name), "r+b")  # noqa: SIM115
        self.places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def listed(self) -> dict[str, list[Any]]:
        """Name -> start, dtype and shape of every tensor as JSON, for :meth:`cut`."""
        return {name: [start, _DTYPES[dtype], list(shape)] for name, (start, dtype, shape) in self.places.items()}

    def cut(self, size: int, listed: Mapping[str, list[Any]]) -> None:
        """Truncate the file to its first ``size`` bytes, which hold the tensors ``listed``."""
        dtypes = {name: dtype for dtype, name in _DTYPES.items()}
        self.file.truncate(size)
        self.places = {
            name: (start, dtypes[dtype], torch.Size(shape)) for name, (start, dtype, shape) in listed.items()
        }

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        end = self.file.seek(0, 2)
        start = self.file.seek(end + -end % _ALIGNMENT)
        self.file.write(_bytes_of(tensor))  # type: ignore[call-overload]
        self.file.flush()
        self.places[name] = (start, tensor.dtype, tensor.shape)

    def __getitem__(self, name: str) -> Tensor:
        start, dtype, shape = self.places[name]
        if not shape.numel():  # an empty tensor cannot be mapped
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(self.file, mode="c", offset=start, shape=dtype.itemsize * shape.numel())
        return torch.from_numpy(mapped).view(dtype).view(shape)

    def __delitem__(self, name: str) -> None:
        del self.places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
