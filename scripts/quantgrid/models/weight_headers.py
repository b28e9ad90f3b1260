"""Checks of safetensors headers: complete files with all tensors of the architecture.

A file begins with the length and the JSON of its header (https://huggingface.co/docs/safetensors).
No tensor is read, and no header of absurd length. Standard library only: the check runs while the
workflow is planned.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError
from .dequantize import METHODS
from .multimodal import LAYOUTS, in_files, prefix_of, stored_name
from .plans import END_ROLES, LAYER_PREFIX, Stored, is_in_mixture
from .shapes import ModelShape

# bytes; the header of a shard of thousands of tensors has some hundred thousand
LONGEST_HEADER = 1 << 25
# tensors that a decoder does not read, as regular expressions: tables that follow from config.json, and
# modules that predict further tokens
IGNORED = (r".*\.rotary_emb\.inv_freq", r"mtp\..*")
# key of config.json: number of layers behind the decoder's that predict further tokens
FURTHER_LAYERS = "num_nextn_predict_layers"
# already quantized formats that transformers can dequantize: quant_method -> its config class
DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def tensor_headers(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets, file} of safetensors files, from their headers.

    Raises :class:`ConfigError` for an incomplete file.
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
        raise ConfigError(
            f"{file}: not a complete safetensors file (its header does not fit; a Git LFS pointer or a "
            "download cut short?)"
        )
    header.pop("__metadata__", None)
    if wrong := next((name for name, tensor in header.items() if not _is_tensor(tensor)), None):
        raise ConfigError(
            f"{file}: not a safetensors file: '{wrong:.80}' has no consistent dtype, shape and data_offsets"
        )
    if 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0) != size:
        raise ConfigError(
            f"{file}: not a complete safetensors file ({size} bytes are not what its header says); fetch it again"
        )
    return header


def _is_tensor(tensor: Any) -> bool:
    """Check whether a header entry describes a tensor with a size that matches its shape."""
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


def verify_weights(
    tensors: Mapping[str, Mapping[str, Any]], shape: ModelShape, where: str, config: Mapping[str, Any]
) -> None:
    """Raise :class:`ConfigError` for a missing tensor, a wrong size, a type other than floating point,
    and a tensor that nothing reads.

    ``config`` is the parsed config.json, which determines whether there are an lm_head and biases.
    """
    _require_unquantized(tensors, where)
    prefix, read = prefix_of(config, where), set()
    for name, size in _wanted(shape, config):
        name = stored_name(name, shape.family, prefix, tensors)
        if name in read:
            continue
        read.add(name)
        if name not in tensors:
            raise ConfigError(f"{where}: the weights hold no tensor '{name}', which {shape.architecture} needs")
        found = tensors[name]
        if found["dtype"] not in _FLOATS:
            raise ConfigError(
                f"{where}: '{name}' is {found['dtype']}, not floating point ({', '.join(_FLOATS)}): "
                "already quantized weights"
            )
        if tuple(found["shape"]) != size:
            raise ConfigError(f"{where}: '{name}' is {tuple(found['shape'])} in the weights, {size} by config.json")
    left = next((name for name in tensors if name not in read and not _is_ignored(name, shape, config, prefix)), None)
    if left is not None:
        raise ConfigError(
            f"{where}: the weights hold '{left}', which {shape.architecture} with this config.json leaves out"
            + (" (attention_bias, mlp_bias)" if left.endswith(".bias") else "; its numbers would be dropped")
        )


def _require_unquantized(tensors: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise :class:`ConfigError`, naming the format, for weights stored in MXFP4 or FP8."""
    for name, tensor in tensors.items():
        packed = name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors
        if packed or tensor["dtype"].startswith("F8_"):
            method = "mxfp4" if packed else "fp8"
            raise ConfigError(f"{where}: '{name:.80}' is already quantized ({method.upper()}); {remedy(method)}")


def remedy(method: str) -> str:
    """Way out for a model that is already quantized, by the name of the method in its quantization_config."""
    advice = "name the full-precision checkpoint it was made from"
    if method in METHODS:
        advice += f", set dequantize: {method}"
    if method not in DEQUANTIZED:
        return advice
    return (
        f"{advice}, or dequantize it once with transformers: AutoModelForCausalLM.from_pretrained(folder, "
        f"dtype='bfloat16', quantization_config={DEQUANTIZED[method]}(dequantize=True)).save_pretrained(new_folder)"
    )


def _is_ignored(name: str, shape: ModelShape, config: Mapping[str, Any], prefix: str) -> bool:
    """Whether the decoder does without tensor ``name`` of the files."""
    family = shape.family
    patterns = [*IGNORED, *family.ignored, *([LAYOUTS[prefix].ignored] if prefix else [])]
    if family.is_tied(config):
        patterns.append(re.escape(in_files(family.in_files(END_ROLES["lm_head"]), prefix)))
    if re.fullmatch("|".join(patterns), name):
        return True
    layers = in_files(family.in_files(LAYER_PREFIX.partition("{")[0]), prefix)
    layer = re.match(re.escape(layers) + r"(\d{1,9})\.", name)
    return layer is not None and 0 <= int(layer[1]) - shape.layers < (config.get(FURTHER_LAYERS) or 0)


def _wanted(shape: ModelShape, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name in the checkpoint with canonical modules, size) of every tensor that a decoder needs.

    A generator, because config.json may claim any number of layers. Tensors with several parts come up
    more than once.
    """
    yield from _wanted_ends(shape, config)
    family, biased = shape.family, shape.family.biased(config)
    for layer in range(shape.layers):
        prefix, plan = LAYER_PREFIX.format(layer=layer), shape.plan(layer)
        sizes = dict.fromkeys(
            [f"{norm}{part}" for norm in family.norms for part in ("", "_bias")], (shape.hidden_size,)
        )
        sizes |= {latent.norm_role: (shape.site_size(latent.site),) for latent in family.latents}
        sizes |= {reader: shape.linear_size(reader) for reader in plan.readers}
        sizes |= {"output_norm": (shape.linear_head_dim,)} if "output_norm" in plan.tensors else {}
        experts = family.experts if shape.is_sparse(layer) else None
        own = [role for role in (*plan.readers, *plan.linears) if role in plan.readers or is_in_mixture(role)]
        with_bias = {*biased, *(own if experts is not None and experts.biased else [])}
        for linear in plan.linears:
            sizes[linear] = shape.linear_size(linear)
        sizes |= {f"{linear}_bias": sizes[linear][:1] for linear in list(sizes) if linear in with_bias}
        for role, size in sizes.items():
            if role in plan.tensors:
                place = plan.stored.get(plan.tensors[role], Stored(plan.tensors[role]))
                yield prefix + place.name, _size_in_file(place, size, shape)
        for kept in plan.kept:
            size = tuple(part if isinstance(part, int) else getattr(shape, part) for part in kept.dimensions)
            yield prefix + kept.place.name, size
        key, head_norms = family.head_norms_key, shape.family_of(layer).head_norms
        for module, width in head_norms.items() if not key or family.value(config, key) else ():
            size = shape.head_dim if width == "head" else shape.linear_size(width)[0]
            yield f"{prefix}{module}.weight", (size,)


def _size_in_file(place: Stored, size: tuple[int, ...], shape: ModelShape) -> tuple[int, ...]:
    """Size of the tensor at ``place``, for a part of this ``size``."""
    if place.parts:
        size = (sum(shape.linear_size(part)[0] for part in place.parts), *size[1:])
    size = size[::-1] if place.transposed else size
    return size if place.index is None else (shape.experts, *size)


def _wanted_ends(shape: ModelShape, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """:func:`_wanted` of the tensors outside of the layers."""
    family, table = shape.family, (shape.vocabulary, shape.hidden_size)
    rows = (family.value(config, "max_position_embeddings") or 0) + (family.positions or 0)
    sizes = {"embedding": table, "lm_head": table, "lm_head_bias": table[:1], "positions": (rows, shape.hidden_size)}
    for role, name in END_ROLES.items():
        place = family.ends.get(name)
        if place is not None and place.name and not (role == "lm_head" and family.is_tied(config)):
            yield place.name, sizes.get(role, table[1:])
