"""Outputs of every rule, the record of their content, and one job of a rule whose outputs carry a key. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

FIGURE = ("png", "pdf", "svg", "csv")
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
REPORTS: dict[str, dict[str, str]] = {  # rules whose outputs carry no key: checks of models, and all that readers look at
    "check_model": {"result": "checks/{model}.json"},
    "collect_study": {"records": "studies/{study}.csv", "items": "studies/{study}.items.parquet"},
    "collect_results": {"csv": "results.csv", "parquet": "results.parquet", "cells": "cells.csv"},
    "list_steps": {"steps": "steps.csv"},
    "tabulate_study": {suffix: f"tables/{{study}}.{suffix}" for suffix in ("csv", "md", "tex")},
    "compare_study": {suffix: f"comparisons/{{study}}.{suffix}" for suffix in ("csv", "md", "tex")},
    "plot_study": {suffix: f"figures/{{study}}.{suffix}" for suffix in FIGURE},
    "evaluate_claims": {"claims": "claims.csv"},
    "plot_pareto": {suffix: f"pareto.{suffix}" for suffix in FIGURE},
    "plot_number_lines": {suffix: f"number-lines.{suffix}" for suffix in FIGURE},
    "plot_losses": {suffix: f"learning.{suffix}" for suffix in FIGURE},
    "plot_depth": {suffix: f"depth.{suffix}" for suffix in FIGURE},
    "plot_distributions": {suffix: f"distributions/{{model}}/{{figure}}.{suffix}" for suffix in FIGURE},
    "build_report": {"report": "report.html"},
}
COMPUTING = tuple(rule for rule in OUTPUTS if rule not in ("fetch_model", "tokenize_corpus"))  # with a device, a dtype and threads
OPTIONAL_INPUTS = {"fit_transform": ("statistics", "windows"), "quantize_model": ("statistics", "windows")}


@dataclass(frozen=True)
class Step:
    """One job: its rule, the wildcards of its outputs (``key`` among them), what it is told, reads and writes.

    ``digest`` is the record of the content of its outputs, ``digests`` those of its inputs.
    """

    rule: str
    wildcards: Mapping[str, str]
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    digest: str
    digests: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.wildcards["key"]


def outputs_of(rule: str) -> dict[str, str]:
    """Output name -> pattern of its path below the results folder, for any rule."""
    return OUTPUTS.get(rule) or REPORTS[rule]


def digest_pattern(rule: str) -> str:
    """Path of the record of what a job of ``rule`` wrote, below the results folder, with the rule's wildcards in the order of its first output."""
    first = next(iter(outputs_of(rule).values()))
    wildcards = [name for name in re.findall(r"{(\w+)}", first) if name != "figure"]  # a rule may write several figures
    return f"digests/{rule}/{'/'.join(f'{{{name}}}' for name in wildcards) or 'all'}.json"


DIGESTS = {rule: digest_pattern(rule) for rule in (*OUTPUTS, *REPORTS)}


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is asked for the same again and again, by every cell, and that works it out once; its object keeps the answers in ``given``."""

    @wraps(method)
    def answer(self: Any, *asked: Any) -> Any:
        key = (method.__name__, *asked)
        if key not in self.given:
            self.given[key] = method(self, *asked)
        return self.given[key]

    return answer
