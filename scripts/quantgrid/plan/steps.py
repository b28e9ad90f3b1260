"""Outputs of every rule, the record of their content, and the step: one job of a rule whose outputs
carry a key. Standard library only."""

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
    "measure_sensitivity": {"sensitivities": "sensitivities/{model}/{calibration}/{key}.json"},
    "fit_transform": {
        "transform": "transforms/{model}/{transform}/{target}/{key}/transform.safetensors",
        "losses": "transforms/{model}/{transform}/{target}/{key}/losses.csv",
    },
    "gate_model": {"result": "gates/{model}/{key}.json"},
    "gate_transform": {"result": "gates/{model}/{transform}/{target}/{key}.json"},
    "measure_distributions": {"distribution": "distributions/{model}/{transform}/{target}/{key}.json"},
    "measure_schemes": {"errors": "schemes/{model}/{transform}/{mitigation}/{key}.json"},
    "allocate_bits": {"allocation": "allocations/{model}/{transform}/{mitigation}/{format}/{key}.json"},
    "quantize_model": {
        "checkpoint": f"quantized/{CELL_PATH}/{{key}}/model.safetensors",
        "manifest": f"quantized/{CELL_PATH}/{{key}}/quantgrid.json",
        "error": f"evaluations/{CELL_PATH}/error/{{key}}.json",
    },
    "train_mitigation": {
        "checkpoint": f"trained/{CELL_PATH}/{{key}}/model.safetensors",
        "manifest": f"trained/{CELL_PATH}/{{key}}/quantgrid.json",
        "losses": f"trained/{CELL_PATH}/{{key}}/losses.csv",
        "error": f"evaluations/{CELL_PATH}/training/{{key}}.json",
    },
    "evaluate_reference": {"reference": "references/{model}/{corpus}/{shard}/{key}.safetensors"},
    "evaluate_perplexity": {"result": f"evaluations/{CELL_PATH}/perplexity/{{corpus}}/{{shard}}/{{key}}.json"},
    "merge_shards": {"result": f"evaluations/{CELL_PATH}/perplexity/{{corpus}}/{{key}}.json"},
    "screen_cell": {
        "result": f"evaluations/{CELL_PATH}/screened/{{corpus}}/{{shard}}/{{key}}.json",
        "error": f"evaluations/{CELL_PATH}/screening/{{corpus}}/{{shard}}/{{key}}.json",
    },
    "decide_race": {"decision": "races/{study}/{model}/{look}/{key}.json"},
    "evaluate_tasks": {"result": f"evaluations/{CELL_PATH}/tasks/{{key}}.json"},
    "measure_residual_error": {"result": f"evaluations/{CELL_PATH}/residual_error/{{corpus}}/{{key}}.json"},
    "export_model": {"folder": f"exports/{CELL_PATH}/{{to}}/{{key}}"},
}
REPORTS: dict[
    str, dict[str, str]
] = {  # rules without keys in their outputs: checks of models, and all files for readers
    "check_baseline": {"result": "checks/{model}.json"},
    "collect_study": {"records": "studies/{study}.csv", "samples": "studies/{study}.items.parquet"},
    "collect_results": {"csv": "results.csv", "parquet": "results.parquet", "cells": "cells.csv"},
    "list_steps": {"steps": "steps.csv"},
    "tabulate_study": {suffix: f"tables/{{study}}.{suffix}" for suffix in ("csv", "md", "tex")},
    "compare_study": {suffix: f"comparisons/{{study}}.{suffix}" for suffix in ("csv", "md", "tex")},
    "plot_study": {suffix: f"figures/{{study}}.{suffix}" for suffix in FIGURE},
    "evaluate_claims": {"claims": "claims.csv"},
    "plot_pareto": {suffix: f"pareto.{suffix}" for suffix in FIGURE},
    "plot_number_lines": {suffix: f"number-lines.{suffix}" for suffix in FIGURE},
    "plot_losses": {suffix: f"learning.{suffix}" for suffix in FIGURE},
    "plot_residual_error": {suffix: f"residual-error.{suffix}" for suffix in FIGURE},
    "plot_allocations": {suffix: f"allocations.{suffix}" for suffix in FIGURE},
    "plot_distributions": {suffix: f"distributions/{{model}}/{{figure}}.{suffix}" for suffix in FIGURE},
    "build_report": {"report": "report.html"},
}
COMPUTING = tuple(
    rule
    for rule in OUTPUTS
    if rule not in ("fetch_model", "tokenize_corpus", "merge_shards", "screen_cell", "decide_race", "allocate_bits")
)  # have a device, a dtype and threads
# decide whether cells are computed, not their results: their key covers what they read, not how they compare it
GATES = ("gate_model", "gate_transform")
OPTIONAL_INPUTS = {
    "fit_transform": ("statistics", "windows"),
    "measure_schemes": ("held_out",),
    **dict.fromkeys(("quantize_model", "screen_cell"), ("statistics", "windows", "allocation")),
    "train_mitigation": ("sensitivities",),
    "export_model": ("measured", "baseline"),
}
GATHERED = {"merge_shards": "shards"}  # one list of all inputs, by the name of its option


@dataclass(frozen=True)
class Step:
    """One job: its rule, the wildcards of its outputs (``key`` among them), its specification,
    inputs and outputs.

    ``digest`` is the record of the content of its outputs, ``digests`` are those of its inputs.
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
    """Map each output of a rule to the pattern of its path below the results folder."""
    return OUTPUTS.get(rule) or REPORTS[rule]


def job_pattern(rule: str) -> str:
    """Return rule and wildcards of a job as the end of a path, in the order of the first output;
    ``all`` for a rule without wildcards."""
    first = next(iter(outputs_of(rule).values()))
    # a rule may write several figures
    wildcards = [name for name in re.findall(r"{(\w+)}", first) if name != "figure"]
    return f"{rule}/{'/'.join(f'{{{name}}}' for name in wildcards) or 'all'}"


DIGESTS = {rule: f"digests/{job_pattern(rule)}.json" for rule in (*OUTPUTS, *REPORTS)}


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """Memoize a method per instance, in ``given``."""

    @wraps(method)
    def answer(self: Any, *asked: Any) -> Any:
        key = (method.__name__, *asked)
        if key not in self.given:
            self.given[key] = method(self, *asked)
        return self.given[key]

    return answer
