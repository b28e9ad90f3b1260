"""A config with every kind of step, its plan, and the steps that an edit of it changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from grid_cases import SHAPE
from quantgrid.config import check
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.steps import OUTPUTS

TINY = "tests/data/tiny-llama"
EVALUATIONS = ("evaluate_perplexity", "merge_shards", "evaluate_tasks")
EXPORTED = ("none", "rtn", "channel", "int4")
Edit = Callable[[dict[str, Any]], Any]
Steps = dict[tuple[str, ...], str]


def content() -> dict[str, Any]:
    """A config of three studies on one model: every kind of step, two corpora, two calibrations, two
    tasks."""
    common = {"models": ["tiny"], "granularities": ["channel"]}
    return {
        "seed": 3,
        "compute": {"device": "cpu", "dtype": "float32"},
        "models": {
            "tiny": {"source": "local", "path": TINY},
            "big": {"source": "hub", "id": "a/b", "revision": "main", "shape": dict(SHAPE)},
        },
        "corpora": {
            "text": {"source": "builtin", "part": "calibration", "window": 64, "windows": 24},
            "short": {"source": "builtin", "part": "calibration", "window": 32, "windows": 24},
            "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 4},
            "more": {"source": "builtin", "part": "evaluation", "window": 32, "windows": 4},
        },
        "calibrations": {"default": {"corpus": "text"}, "other": {"corpus": "short"}},
        "transforms": {
            "smooth": {"method": "scaling", "alpha": 0.5},
            "rotation": {"method": "random_hadamard", "seeds": [0, 1]},
            "turn": {"method": "random_hadamard"},
        },
        "mitigations": {
            "lr8": {"method": "low_rank", "rank": 8},
            "solved": {"method": "gptq", "damping": 0.01, "calibration": "other"},
            "tuned": {"method": "tune_scales", "steps": 3},
        },
        "formats": {
            "int4-mse": {"preset": "int4", "weight": {"range": "mse"}},
            "shared": {"allocate": {"budget": 6, "schemes": ["w4a16", "w8a16 channel"]}},
        },
        "tasks": {
            "cloze": {"source": "builtin", "kind": "cloze", "items": 8},
            "true": {"source": "builtin", "kind": "continuation", "items": 8},
        },
        "evaluate": {"perplexity": ["docs"]},
        "exports": [{"model": "tiny", "cell": "/".join(EXPORTED), "to": "compressed-tensors"}],
        "report": {"distributions": ["smooth", "turn"]},
        "studies": {
            "methods": {
                **common,
                "transforms": ["none", "smooth", "rotation", "turn"],
                "mitigations": ["rtn", "lr8", "solved"],
                "formats": ["int4"],
                "also": [{"formats": ["bf16"]}],
                "exclude": [{"transform": "turn", "mitigation": "solved"}],
            },
            "formats": {
                **common,
                "transforms": ["none"],
                "mitigations": ["rtn"],
                "formats": ["int4", "int4-mse"],
                "title": "Formats",
                "also": [
                    {"mitigations": ["tuned"], "formats": ["int4"]},
                ],
                "evaluate": {"perplexity": ["docs", "more"], "tasks": ["cloze", "true"], "residual_error": ["docs"]},
                "figure": {"dataset": "docs"},
            },
            "bits": {
                **common,
                "transforms": ["none"],
                "mitigations": ["rtn"],
                "granularities": ["native"],
                "formats": ["shared"],
            },
        },
    }


def plan(config: dict[str, Any]) -> Plan:
    made = Plan(check(config))
    made.all_evaluations()
    made.distributions()
    made.all_exports()
    return made


@cache
def unedited() -> Steps:
    """The steps of :func:`content`."""
    return steps(content())


def steps(config: dict[str, Any]) -> Steps:
    """(rule, wildcards of its path in their order) -> key, of every step."""
    found: Steps = {}
    for rule, known in plan(config).steps.items():
        names = [name for name in re.findall(r"{(\w+)}", next(iter(OUTPUTS[rule].values()))) if name != "key"]
        found |= {(rule, *(step.wildcards[name] for name in names)): step.key for step in known.values()}
    return found


def after(edit: Edit) -> Steps:
    config = content()
    edit(config)
    return steps(config)


def changed(edit: Edit) -> set[tuple[str, ...]]:
    """The steps whose keys an edit changes; it neither adds nor removes one."""
    before, now = unedited(), after(edit)
    assert before.keys() == now.keys()
    return {step for step in before if before[step] != now[step]}


def rules(found: Iterable[tuple[str, ...]]) -> set[str]:
    return {rule for rule, *_ in found}


def all_of(*wanted: str) -> set[tuple[str, ...]]:
    return {step for step in unedited() if step[0] in wanted}


def naming(name: str) -> set[tuple[str, ...]]:
    """All steps with ``name`` in their path."""
    return {step for step in unedited() if name in step[1:]}
