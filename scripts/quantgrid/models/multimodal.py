"""Layouts of checkpoints: text decoders inside multimodal ones, and experts in one tensor.

A multimodal checkpoint is quantized as its text decoder. Its config.json nests that of the decoder under
``text_config``; its files hold the decoder's tensors below a prefix, and those of the vision tower and
the projector, which are left out. Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from .families import FAMILIES, MODEL_TYPES
from .family import Family
from .plans import END_ROLES

# multimodal architecture -> model type of its text decoder, where config.json leaves it out
WRAPPERS: dict[str, str] = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen3_5ForConditionalGeneration": "qwen3_5_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe_text",
}
# key of a canonical config.json: what the names of the decoder's tensors begin with in place of ``model.``
PREFIX = "decoder_prefix"
STACKED = "stacked_experts"  # and whether one tensor holds all experts of a layer, unlike in the family's own files
_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "transformers_version")


@dataclass(frozen=True)
class Layout:
    """Names in a multimodal checkpoint: of the lm_head, and, as a regular expression, of what is left out."""

    lm_head: str
    ignored: str


_OTHERS = r"(vision_tower|multi_modal_projector|visual)\..*"
# prefix -> the other names; the first as most versions of transformers write it
LAYOUTS: dict[str, Layout] = {
    "language_model.model.": Layout("language_model.lm_head.weight", _OTHERS),
    "model.language_model.": Layout("lm_head.weight", r"model\." + _OTHERS),
}


def text_decoder(
    config: Mapping[str, Any], tensors: Collection[str] = (), where: str = "config.json"
) -> dict[str, Any]:
    """config.json of the text decoder in a multimodal checkpoint; of another one ``config`` itself.

    ``tensors``: the names in the files, which determine the layout, and whether the lm_head is the
    embedding: as in transformers, a stored one is not. A decoder that was saved alone may have kept the names.
    """
    names = config.get("architectures")
    wrapper = next((name for name in WRAPPERS if names == [name]), None)
    if wrapper is None:
        return {**config, **_layout(config, tensors)}
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"{where}: {wrapper} needs its text decoder under 'text_config', got {text!r:.60}")
    model_type = text.get("model_type", WRAPPERS[wrapper])
    architecture = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    defaults = {} if architecture is None else FAMILIES[architecture].defaults
    prefix = _prefix(tensors)
    stored = prefix is not None and LAYOUTS[prefix].lm_head in tensors
    outer = {key: config[key] for key in (*_OUTER, "quantization_config") if key in config}
    found = {
        **defaults,
        **outer,
        **text,
        "architectures": [] if architecture is None else [architecture],
        "model_type": model_type,
        "tie_word_embeddings": False if stored else config.get("tie_word_embeddings", True),
    }
    return {**found, **_layout(found, tensors)}


def _prefix(tensors: Collection[str]) -> str | None:
    """Prefix of the decoder among the names in the files; None for a checkpoint of text alone."""
    return next((prefix for prefix in LAYOUTS if any(name.startswith(prefix) for name in tensors)), None)


def _layout(config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """Keys of a canonical config.json for how the files name the tensors of a decoder."""
    prefix, names = _prefix(tensors), config.get("architectures")
    family = FAMILIES.get(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None
    stacked = family is not None and family.experts is not None and not family.experts.is_stacked
    held = stacked and any(name.endswith(family.stacked.experts.stored["gate"]) for name in tensors)
    return {**({} if prefix is None else {PREFIX: prefix}), **({STACKED: True} if held else {})}


def prefix_of(config: Mapping[str, Any], where: str = "config.json") -> str:
    """Prefix of the decoder's tensors by a canonical ``config``; empty for a checkpoint of text alone."""
    prefix = config.get(PREFIX, "")
    if prefix not in ("", *LAYOUTS):
        raise ConfigError(f"{where}: {PREFIX}: {unknown_name('prefix', prefix, LAYOUTS)}")
    return prefix


def in_files(name: str, prefix: str) -> str:
    """Name in the files of the decoder's tensor ``name``."""
    if not prefix:
        return name
    return LAYOUTS[prefix].lm_head if name == END_ROLES["lm_head"] else prefix + name.removeprefix("model.")


def stored_name(name: str, family: Family, prefix: str, tensors: Collection[str]) -> str:
    """Name among those in the files (``tensors``) of the decoder's tensor ``name``.

    Files of the model below the lm_head alone leave out the beginning of every name.
    """
    full = in_files(family.in_files(name), prefix)
    bare = full.removeprefix(family.in_files("model").partition(".")[0] + ".")
    return bare if full not in tensors and bare in tensors else full
