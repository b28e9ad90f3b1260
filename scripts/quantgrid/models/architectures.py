"""Architecture named in a config.json, or the reason to refuse it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from ..ground.errors import ConfigError, UnsupportedModel, shortened
from .families import FAMILIES, MODEL_TYPES, OBSTACLES

LIST = "docs/reference/models.md"  # of the supported architectures
_SUFFIX = "ForCausalLM"
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def architecture_of(config: Mapping, where: str = "config.json") -> str:
    """Architecture name in a transformers ``config``.

    Raises :class:`UnsupportedModel` with instructions for adding one.
    """
    named, model_type = config.get("architectures") or [], config.get("model_type", "")
    if not (isinstance(named, list) and all(isinstance(name, str) for name in [*named, model_type])):
        raise ConfigError(
            f"{where}: 'architectures' has to be a list of names and 'model_type' a name; "
            f"got {named!r} and {model_type!r}"
        )
    name = (named or [MODEL_TYPES.get(model_type, "")])[0]
    sparse = "Moe" in name or "moe" in model_type or any(config.get(key) for key in _EXPERT_KEYS)
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"{where}: {_unknown(name, model_type, sparse)}; {_listed(name or model_type)}. "
            "CONTRIBUTING.md says how to add one"
        )
    if sparse and FAMILIES[name].experts is None:
        raise UnsupportedModel(
            f"{where}: {name} is a dense decoder, and this config.json describes a mixture of experts "
            f"({', '.join(key for key in _EXPERT_KEYS if config.get(key))})"
        )
    return name


def _unknown(name: str, model_type: str, sparse: bool) -> str:
    """Reason to refuse an architecture: what stands in the way, if that is known."""
    wanted = model_type or name.removesuffix(_SUFFIX).lower()
    known = next((obstacle for begin, obstacle in OBSTACLES.items() if wanted.startswith(begin)), None)
    if known is not None:
        return f"'{shortened(name or model_type)}' has {known}, not supported yet"
    return f"{'unknown mixture of experts' if sparse else 'unknown architecture'} '{shortened(name or model_type)}'"


def _listed(name: str) -> str:
    """Number of supported architectures, where they are listed, and those whose names are like ``name``."""
    short = {family.removesuffix(_SUFFIX).lower(): family for family in FAMILIES}
    close = [short[found] for found in get_close_matches(name.removesuffix(_SUFFIX).lower(), short)]
    hint = f", with similar names {', '.join(close)}" if close else ""
    return f"{len(FAMILIES)} are supported ({LIST}){hint}"
