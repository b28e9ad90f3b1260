"""Keys of a GGUF file: sizes and positions of the model, its tokenizer, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from ..ground.errors import ConfigError
from ..models.shapes import ModelShape
from .gguf_names import architecture_of
from .gguf_tokenizer import GGUFTokenizer
from .packed_cell import PackedCell

_QUANTIZATION_VERSION = 2
_FILE_TYPES = {"MXFP4": "MOSTLY_MXFP4_MOE"}


@dataclass(frozen=True)
class GGUFModel:
    """Settings of a model that llama.cpp reads: ``context`` tokens, ``epsilon`` of the norms,
    ``base`` and linear ``scaling`` of rotary positions, and divisors of their frequencies
    (head_dim/2,) float32 or None."""

    context: int
    epsilon: float
    base: float
    scaling: float | None = None
    frequency_factors: np.ndarray | None = None


def model_of(cell: PackedCell) -> GGUFModel:
    """Settings of a cell; :class:`ConfigError` for one that llama.cpp would compute differently."""
    from transformers import AutoConfig

    settings, where = AutoConfig.for_model(**cell.config), f"{cell.checkpoint.path}: config"
    if settings.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act is {settings.hidden_act!r}; GGUF accepts silu")
    context, window = settings.max_position_embeddings, _window(settings)
    rope: dict[str, Any] = dict(settings.rope_parameters)
    kind, base = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: rotary positions of a part of a head; GGUF accepts whole heads here")
    found = {"context": min(context, window or context), "epsilon": settings.rms_norm_eps, "base": base}
    if kind == "default":
        return GGUFModel(**found)
    if kind == "linear":
        return GGUFModel(**found, scaling=float(rope["factor"]))
    if kind == "llama3" and architecture_of(cell.shape) == "llama":
        return GGUFModel(**found, frequency_factors=_factors(settings, base, cell.shape.head_dim))
    raise ConfigError(f"{where}: rope_type '{kind}'; GGUF accepts default, linear and, for Llama, llama3")


def _window(settings: Any) -> int | None:
    """Tokens that a position attends to, None for all: a context of no more tokens is exact."""
    if not getattr(settings, "use_sliding_window", True):
        return None
    return getattr(settings, "sliding_window", None)


def _factors(settings: Any, base: float, head_dim: int) -> np.ndarray:
    """Divisors of the frequencies of Llama 3, from transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float().numpy()


def add_metadata(
    writer: gguf.GGUFWriter,
    shape: ModelShape,
    model: GGUFModel,
    tokenizer: GGUFTokenizer,
    general: Mapping[str, str],
    file_type: str,
) -> None:
    """Add all keys; ``file_type`` is the GGML type of the quantized linears."""
    _add_general(writer, general, file_type)
    _add_model(writer, shape, model)
    _add_tokenizer(writer, tokenizer)


def _add_general(writer: gguf.GGUFWriter, general: Mapping[str, str], file_type: str) -> None:
    writer.add_type("model")
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    if any(key.startswith("base_model.0.") for key in general):
        writer.add_base_model_count(1)
    writer.add_quantized_by("quantgrid")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(file_type, f"MOSTLY_{file_type}")])
    writer.add_quantization_version(_QUANTIZATION_VERSION)


def _add_model(writer: gguf.GGUFWriter, shape: ModelShape, model: GGUFModel) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_freq_base(model.base)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    if model.scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.scaling)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: GGUFTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_array("tokenizer.ggml.scores", tokenizer.scores)
    for name, index in tokenizer.special.items():
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.model == "llama":
        writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
