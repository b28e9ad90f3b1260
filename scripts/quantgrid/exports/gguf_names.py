"""Tensor names of GGUF files, and the order of the rows of q and k in them."""

from __future__ import annotations

from functools import cache

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from ..ground.errors import ConfigError
from ..models.plans import kind_of
from ..models.shapes import ModelShape
from .gguf_capabilities import ARCHITECTURES

PARTS = (".weight", ".bias")


def architecture_of(shape: ModelShape) -> str:
    """Name of llama.cpp for the architecture."""
    return ARCHITECTURES[shape.architecture][0]


@cache
def _names(architecture: str, layers: int) -> TensorNameMap:
    found = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(MODEL_ARCH(found), layers)


def gguf_name(shape: ModelShape, name: str) -> str:
    """Name in the file of a tensor of transformers, such as ``blk.0.attn_q.weight``."""
    found = _names(architecture_of(shape), shape.layers).get_name(name, try_suffixes=PARTS)
    if found is None:
        raise ValueError(f"{name}: no tensor of {architecture_of(shape)} in GGUF")
    return found


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads x d, *) of q or k, in halves within a head as transformers rotates them, as the
    pairs of neighbours that llama.cpp rotates (architecture ``llama``)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of :func:`interleaved`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rotated_heads(shape: ModelShape, role: str) -> int:
    """Heads within which the rows of a linear are reordered; 0 for none."""
    heads = {"q": shape.heads, "k": shape.kv_heads}
    return heads.get(role, 0) if architecture_of(shape) == "llama" else 0


def require_read_bias(shape: ModelShape, role: str, name: str) -> None:
    """Raise :class:`ConfigError` if llama.cpp does not read the bias of the linear ``name``."""
    found, read = ARCHITECTURES[shape.architecture]
    if kind_of(role) not in read:
        raise ConfigError(f"{name}: '{found}' of llama.cpp reads no bias of {role}; those of {', '.join(read)} it does")
