"""Tensors of a decoder by the headers of its safetensors files: whole files, with all that the architecture needs.

A file opens with the length and the JSON of its header (https://huggingface.co/docs/safetensors); no tensor is read,
and no header of absurd length. Standard library only: this is checked while the workflow is planned.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .architecture import END_ROLES, LINEARS, ModelShape, layer_tensors
from .errors import ConfigError

LONGEST_HEADER = 1 << 25  # bytes; a shard of thousands of tensors has some hundred thousand
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def tensor_headers(files: list[Path]) -> dict[str, dict[str, Any]]:
    """tensor name -> {dtype, shape, data_offsets, file} of safetensors files, from their headers alone.

    Raises :class:`ConfigError` for a file that is not whole.
    """
    return {name: {**tensor, "file": file.name} for file in files for name, tensor in _header(file).items()}


def _header(file: Path) -> dict[str, dict[str, Any]]:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(opened.read(length)) if 8 + length <= size and length <= LONGEST_HEADER else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ConfigError(f"{file}: not a whole safetensors file (its header does not fit; a Git LFS pointer or a "
                          "download cut short?)")
    header.pop("__metadata__", None)
    if wrong := next((name for name, tensor in header.items() if not _is_tensor(tensor)), None):
        raise ConfigError(f"{file}: not a safetensors file: '{wrong:.80}' has no dtype, shape and data_offsets that "
                          "go together")
    if 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0) != size:
        raise ConfigError(f"{file}: not a whole safetensors file ({size} bytes are not what its header says); fetch "
                          "it again")
    return header


def _is_tensor(tensor: Any) -> bool:
    """Whether an entry of a header describes a tensor whose place is as large as its shape says."""
    if not (isinstance(tensor, dict) and isinstance(tensor.get("dtype"), str)):
        return False
    shape, offsets = tensor.get("shape"), tensor.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        return False
    width = _FLOATS.get(tensor["dtype"])
    return offsets[0] <= offsets[1] and (width is None or offsets[1] - offsets[0] == width * math.prod(shape))


def _are_sizes(numbers: Any) -> bool:
    whole = isinstance(numbers, list) and len(numbers) < 9 and all(type(number) is int for number in numbers)
    return whole and all(0 <= number < 1 << 60 for number in numbers)


def verify_weights(tensors: Mapping[str, Mapping[str, Any]], shape: ModelShape, where: str,
                   config: Mapping[str, Any]) -> None:
    """:class:`ConfigError` where a tensor is missing, of another size than ``config`` says, or not in floating point.

    ``config`` is the parsed config.json, which says whether there are an lm_head and biases.
    """
    for name, size in _wanted(shape, config):
        if name not in tensors:
            raise ConfigError(f"{where}: the weights hold no tensor '{name}', which {shape.architecture} needs")
        found = tensors[name]
        if found["dtype"] not in _FLOATS:
            raise ConfigError(f"{where}: '{name}' is {found['dtype']}, not floating point ({', '.join(_FLOATS)}): "
                              "already quantized weights")
        if tuple(found["shape"]) != size:
            raise ConfigError(f"{where}: '{name}' is {tuple(found['shape'])} in the weights, {size} by config.json")
    _refuse_unused_biases(tensors, shape, config, where)


def _wanted(shape: ModelShape, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, size) of every tensor that a decoder needs; one by one, since config.json may claim any number of
    layers.
    """
    yield END_ROLES["embedding"], (shape.vocabulary, shape.hidden_size)
    yield END_ROLES["final_norm"], (shape.hidden_size,)
    if not config.get("tie_word_embeddings", False):
        yield END_ROLES["lm_head"], (shape.vocabulary, shape.hidden_size)
    biased = _biased(shape.architecture, config)
    for layer in range(shape.layers):
        names = layer_tensors(shape.architecture, layer)
        yield from ((names[norm], (shape.hidden_size,)) for norm in ("attention_norm", "mlp_norm"))
        yield from ((names[norm], (shape.head_dim,)) for norm in ("q_norm", "k_norm") if norm in names)
        for linear in LINEARS:
            yield names[linear], shape.linear_size(linear)
            if linear in biased:
                yield names[f"{linear}_bias"], shape.linear_size(linear)[:1]


def _biased(architecture: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Linears to which transformers gives a bias."""
    if architecture == "Qwen2ForCausalLM":
        return ("q", "k", "v")
    attention = ("q", "k", "v", "o") if config.get("attention_bias") and architecture != "MistralForCausalLM" else ()
    return attention + (("gate", "up", "down") if config.get("mlp_bias") and architecture == "LlamaForCausalLM" else ())


def _refuse_unused_biases(tensors: Mapping[str, Any], shape: ModelShape, config: Mapping[str, Any], where: str) -> None:
    """:class:`ConfigError` for a bias that config.json leaves out of the function."""
    biased = _biased(shape.architecture, config)
    for layer in range(shape.layers):
        names = layer_tensors(shape.architecture, layer)
        for linear in LINEARS:
            if linear not in biased and (name := names[f"{linear}_bias"]) in tensors:
                raise ConfigError(f"{where}: the weights hold '{name}', which {shape.architecture} with this "
                                  "config.json leaves out "
                                  "(attention_bias, mlp_bias)")
