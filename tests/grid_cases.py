"""Configs and cells for the tests of the grid."""

from __future__ import annotations

from typing import Any

import pytest

from quantgrid.config.cells import Cell
from quantgrid.config.grid import expand_studies
from quantgrid.ground.errors import ConfigError

SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "vocabulary": 49152,
}
ALL_GRANULARITIES = ["tensor", "channel", "group-32", "group-16", "native"]


def study(**changes: Any) -> dict[str, Any]:
    """A study of one cell, with changes; an axis is given as a list."""
    return {
        "models": ["m"],
        "transforms": ["none"],
        "mitigations": ["rtn"],
        "granularities": ["channel"],
        "formats": ["int4"],
        **changes,
    }


def config(*studies: dict[str, Any], shape: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    """Part of a config that the grid reads: models ``m`` and ``n`` of one shape, entries of the
    axes, studies named a, b, ..."""
    model = {"source": "hub", "id": "owner/name", "revision": "main", "shape": {**SHAPE, **(shape or {})}}
    return {"models": {"m": model, "n": model}, **entries, "studies": dict(zip("abcdef", studies))}


def cells(*studies: dict[str, Any], **entries: Any) -> list[Cell]:
    return expand_studies(config(*studies, **entries))


def refusal(*studies: dict[str, Any], **entries: Any) -> str:
    """The message with which the grid refuses the studies."""
    with pytest.raises(ConfigError) as caught:
        cells(*studies, **entries)
    message = str(caught.value)
    assert "\n" not in message
    return message


def transform(method: str, **options: Any) -> dict[str, Any]:
    """Entries of one transform named ``t``."""
    return {"transforms": {"t": {"method": method, **options}}}
