"""Positions of a model: how many its config.json allows, and windows that are longer.

Standard library only: configs are checked while the workflow is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError
from ..ground.storage import read_json
from .declared_shapes import POSITIONS
from .families import FAMILIES, MODEL_TYPES
from .family import Family
from .folders import ADVICE, folder_of
from .multimodal import text_decoder
from .shapes import LARGEST_CONFIG


def positions_of(entry: Mapping[str, Any], where: str = "model") -> int | None:
    """Number of positions of the model of a config entry, if known before it is fetched."""
    folder = folder_of(entry, where)
    return (entry.get("shape") or {}).get(POSITIONS) if folder is None else positions_in(folder)


def positions_in(folder: str | Path) -> int | None:
    """Number of positions of the model in ``folder``; None if its config.json is silent or
    missing."""
    config, family = _described(folder)
    key = "max_position_embeddings"
    return config.get(key) if family is None else family.value(config, key)


def has_position_table(folder: str | Path) -> bool:
    """Whether the model in ``folder`` has a table of positions, which ends."""
    _, family = _described(folder)
    return family is not None and family.positions is not None


def _described(folder: str | Path) -> tuple[dict[str, Any], Family | None]:
    """config.json of a folder, empty without one, and the family of its model type, if it is known."""
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        return {}, None
    config = text_decoder(read_json(path, ADVICE, LARGEST_CONFIG), where=str(path))
    return config, FAMILIES.get(MODEL_TYPES.get(str(config.get("model_type")), ""))


def require_positions(
    entry: Mapping[str, Any], positions: int | None, where: str, model: str, table: bool = False
) -> None:
    """Raise :class:`ConfigError` for windows longer than ``positions`` unless the corpus entry
    allows it; it cannot allow more than a ``table`` of positions has."""
    window, accepted = entry.get("window"), entry.get("beyond_positions") and not table
    if positions and isinstance(window, int) and window > positions and not accepted:
        further = ", its table has no more" if table else ", or accept it with beyond_positions: true"
        raise ConfigError(
            f"{where}.window: windows of {window} tokens are longer than the {positions} positions of {model} "
            f"(max_position_embeddings); set window to at most {positions}{further}"
        )
