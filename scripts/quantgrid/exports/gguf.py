"""A cell as one GGUF file for llama.cpp, written layer by layer.

The file has the codes and scales of the cell in blocks (``gguf_blocks.py``), the embedding, the head
and linears in full precision in bfloat16, norms and biases in float32. Sources: the specification
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the converters of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from ..ground.storage import open_tensors, replacing
from ..models.plans import END_ROLES, LAYER_PREFIX
from ..quantization.packed_linears import PackedLinear
from .gguf_blocks import bfloat16_bytes, blocks_of
from .gguf_capabilities import block_for
from .gguf_metadata import GGUFModel, add_metadata, model_of
from .gguf_names import architecture_of, gguf_name, interleaved, require_read_bias, rotated_heads
from .gguf_tokenizer import GGUFTokenizer
from .packed_cell import ExportLayer, PackedCell

UNROUNDED = "BF16"
_SCALE = ".scale"  # float32 factor of an NVFP4 tensor


@dataclass(frozen=True)
class _Declared:
    """Tensor of the file: its type, and the shape of its bytes (float32: of its elements)."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * (4 if self.type == "F32" else 1)


def file_type(cell: PackedCell) -> str:
    """GGML type of the quantized linears, such as ``Q4_0``; ``BF16`` without any."""
    block = block_for(cell.schemes.weight, str(cell.checkpoint.path))
    return UNROUNDED if block is None else block.name


def file_name(name: str, cell: PackedCell) -> str:
    """Name of the file by the convention of llama.cpp: ``Model-Q4_0.gguf``."""
    return f"{name}-{file_type(cell)}.gguf"


def write_gguf(path: str | Path, cell: PackedCell, tokenizer: GGUFTokenizer, general: Mapping[str, str]) -> int:
    """Write the cell to ``path``; memory holds one layer at a time. Returns the bytes of the tensors.

    ``general`` are keys without the prefix ``general.``: ``name``, ``license``, ``base_model.0.name``.
    Raises :class:`ConfigError` for a config that llama.cpp would compute differently, and for a scale
    that float16 cannot hold.
    """
    model = model_of(cell)
    with replacing(path) as temporary, closing(gguf.GGUFWriter(temporary, architecture_of(cell.shape))) as writer:
        add_metadata(writer, cell.shape, model, tokenizer, general, file_type(cell))
        declared = list(_declared(cell, model))
        for tensor in declared:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32 if tensor.type == "F32" else np.uint8),  # type: ignore[arg-type]
                tensor.bytes,
                gguf.GGMLQuantizationType[tensor.type],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        place = iter(declared)
        for part in _parts(cell, model):
            for _ in range(len(part)):
                tensor = next(place)
                writer.write_tensor_data(_checked(tensor, part.pop(tensor.name)))
    return sum(tensor.bytes for tensor in declared)


def _checked(tensor: _Declared, data: np.ndarray) -> np.ndarray:
    if tuple(data.shape) != tensor.shape:
        raise ValueError(f"{tensor.name}: shape {data.shape}, declared {tensor.shape}")
    return np.ascontiguousarray(data)


def _declared(cell: PackedCell, model: GGUFModel) -> Iterator[_Declared]:
    """Tensors of the file in its order: ends, factors of frequencies, layers."""
    shape = cell.shape
    with open_tensors(cell.checkpoint.path) as file:
        sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for name in END_ROLES.values():
        if name in sizes:
            yield _unrounded(gguf_name(shape, name), sizes[name])
    if model.frequency_factors is not None:
        yield _Declared("rope_freqs.weight", "F32", model.frequency_factors.shape)
    for layer in range(shape.layers):
        plan, prefix = shape.plan(layer), LAYER_PREFIX.format(layer=layer)
        for role, module in plan.modules.items():
            name = prefix + module
            if role not in plan.linears:
                yield _unrounded(gguf_name(shape, f"{name}.weight"), sizes[f"{name}.weight"])
                continue
            yield from _declared_linear(cell, layer, role, gguf_name(shape, f"{name}.weight"))
            if f"{name}.bias" in sizes:
                require_read_bias(shape, role, name)
                yield _unrounded(gguf_name(shape, f"{name}.bias"), sizes[f"{name}.bias"])


def _unrounded(name: str, size: tuple[int, ...]) -> _Declared:
    return _Declared(name, "F32", size) if len(size) == 1 else _Declared(name, UNROUNDED, (*size[:-1], 2 * size[-1]))


def _declared_linear(cell: PackedCell, layer: int, role: str, name: str) -> Iterator[_Declared]:
    size, block = cell.shape.linear_size(role), block_for(cell.checkpoint.weight_scheme(layer, role), name)
    if block is None:
        yield _unrounded(name, size)
        return
    elements, row_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block.name]]
    yield _Declared(name, block.name, (size[0], size[1] // elements * row_bytes))
    if block.name == "NVFP4":
        yield _Declared(name.removesuffix(".weight") + _SCALE, "F32", (1,))


def _parts(cell: PackedCell, model: GGUFModel) -> Iterator[dict[str, np.ndarray]]:
    """Data of the file by tensor name: the ends, then layer by layer."""
    shape = cell.shape
    ends = {
        gguf_name(shape, name): tensor.float().numpy() if tensor.dim() == 1 else bfloat16_bytes(tensor)
        for name, tensor in cell.ends().items()
    }
    yield ends
    if model.frequency_factors is not None:
        yield {"rope_freqs.weight": model.frequency_factors}
    for layer in cell.layers():
        yield _layer(cell, layer)


def _layer(cell: PackedCell, layer: ExportLayer) -> dict[str, np.ndarray]:
    shape = cell.shape
    found = {gguf_name(shape, name): tensor.float().numpy() for name, tensor in layer.plain.items()}
    for linear in layer.joined:
        (role,) = layer.roles[linear.name]
        heads = rotated_heads(shape, role)
        name = gguf_name(shape, f"{linear.name}.weight")
        for part, rows in _linear(linear).items():
            reorder = heads and part != _SCALE
            found[name.removesuffix(".weight") + part] = interleaved(rows, heads) if reorder else rows
    return found


def _linear(linear: PackedLinear) -> dict[str, np.ndarray]:
    """Parts of a linear by the end of their name."""
    found = {} if linear.bias is None else {".bias": linear.bias.float().numpy()}
    if linear.quantized is None:
        return {".weight": bfloat16_bytes(linear.dense()), **found}
    blocks = blocks_of(linear.quantized, linear.name)
    return {".weight": blocks.data, **({} if blocks.scale is None else {_SCALE: blocks.scale}), **found}
