"""Rules whose outputs carry a key: where each writes, and one of their jobs. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

CELL_PATH = "{model}/{transform}/{mitigation}/{granularity}/{format}"
OUTPUTS: dict[str, dict[str, str]] = {
    "fetch_model": {"folder": "models/{model}/{key}"},
    "tokenize_corpus": {"windows": "corpora/{model}/{corpus}/{key}.safetensors"},
    "calibrate_model": {"statistics": "calibration/{model}/{calibration}/{key}/statistics.safetensors"},
    "fit_transform": {"transform": "transforms/{model}/{transform}/{target}/{key}/transform.safetensors",
                      "losses": "transforms/{model}/{transform}/{target}/{key}/losses.csv"},
    "describe_transform": {"distribution": "distributions/{model}/{transform}/{target}/{key}.json"},
    "quantize_model": {"checkpoint": f"quantized/{CELL_PATH}/{{key}}/model.safetensors",
                       "manifest": f"quantized/{CELL_PATH}/{{key}}/quantgrid.json",
                       "error": f"evaluations/{CELL_PATH}/error/{{key}}.json"},
    "train_model": {"checkpoint": f"trained/{CELL_PATH}/{{key}}/model.safetensors",
                    "manifest": f"trained/{CELL_PATH}/{{key}}/quantgrid.json",
                    "losses": f"trained/{CELL_PATH}/{{key}}/losses.csv",
                    "error": f"evaluations/{CELL_PATH}/training/{{key}}.json"},
    "evaluate_reference": {"reference": "references/{model}/{corpus}/{key}.safetensors"},
    "evaluate_perplexity": {"result": f"evaluations/{CELL_PATH}/perplexity/{{corpus}}/{{key}}.json"},
    "evaluate_tasks": {"result": f"evaluations/{CELL_PATH}/tasks/{{key}}.json"},
    "measure_depth": {"result": f"evaluations/{CELL_PATH}/depth/{{corpus}}/{{key}}.json"},
}
COMPUTING = tuple(rule for rule in OUTPUTS if rule not in ("fetch_model", "tokenize_corpus"))  # with a device, a dtype and threads
OPTIONAL_INPUTS = {"fit_transform": ("statistics", "windows"), "quantize_model": ("statistics", "windows")}


@dataclass(frozen=True)
class Step:
    """One job: its rule, the wildcards of its outputs (``key`` among them), what it is told, reads and writes."""

    rule: str
    wildcards: Mapping[str, str]
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def key(self) -> str:
        return self.wildcards["key"]


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is asked for the same again and again, by every cell, and that works it out once; its object keeps the answers in ``given``."""

    @wraps(method)
    def answer(self: Any, *asked: Any) -> Any:
        key = (method.__name__, *asked)
        if key not in self.given:
            self.given[key] = method(self, *asked)
        return self.given[key]

    return answer
