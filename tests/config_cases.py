"""A valid config and edits of it, for the tests of refused configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grid_cases import SHAPE
from quantgrid.config import validation
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT

TINY = ROOT / "tests" / "data" / "tiny-llama"
Edit = Callable[[dict[str, Any]], Any]


def valid(**changes: Any) -> dict[str, Any]:
    """A config without a mistake, as YAML gives it, with top-level keys changed."""
    study = {
        "models": ["tiny"],
        "transforms": ["none", "smooth"],
        "mitigations": ["rtn", "lr8"],
        "granularities": ["channel"],
        "formats": ["int4"],
    }
    return {
        "models": {
            "tiny": {"source": "local", "path": str(TINY)},
            "hub": {"source": "hub", "id": "a/b", "revision": "main", "shape": dict(SHAPE)},
        },
        "corpora": {
            "docs": {"source": "builtin", "part": "evaluation", "window": 64},
            "other": {"source": "builtin", "part": "evaluation", "window": 32},
            "text": {"source": "builtin", "part": "calibration", "window": 64},
        },
        "calibrations": {"default": {"corpus": "text"}},
        "transforms": {
            "smooth": {"method": "scaling", "alpha": 0.5},
            "rotation": {"method": "random_hadamard", "seeds": [0, 1]},
        },
        "mitigations": {"lr8": {"method": "low_rank", "rank": 8}, "solved": {"method": "gptq"}},
        "formats": {"int4-mse": {"preset": "int4", "weight": {"range": "mse"}}},
        "tasks": {"cloze": {"source": "builtin", "kind": "cloze", "items": 8}},
        "evaluate": {"perplexity": ["docs"]},
        "studies": {"s": study},
        **changes,
    }


def refusal(edit: Edit) -> str:
    """The message with which the config is refused after an edit of it."""
    content = valid()
    edit(content)
    with pytest.raises(ConfigError) as caught:
        validation.check(content)
    return str(caught.value)


def study(**changes: Any) -> Edit:
    return lambda config: config["studies"]["s"].update(changes)


def entry(group: str, name: str, content: Any) -> Edit:
    """``content`` as the entry ``group.name``."""
    return lambda config: config.setdefault(group, {}).update({name: content})


def changed(group: str, name: str, **changes: Any) -> Edit:
    return lambda config: config[group][name].update(changes)
