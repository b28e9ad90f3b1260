"""Named sets of zero-shot tasks: ``evaluate: {tasks: [spinquant8]}`` expands to all tasks of the
set. Standard library only.

Metrics follow the literature: acc_norm where lm-eval has it (ARC, HellaSwag, MathQA, OpenBookQA,
PIQA), acc elsewhere; all are 0-shot. Averages over different sets are not comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_NORMALIZED = ("arc_challenge", "arc_easy", "hellaswag", "mathqa", "openbookqa", "piqa")
_TASKS = {"lambada": "lambada_openai", "siqa": "social_iqa"}  # tasks with another name in lm-eval


def _hub(*names: str) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "source": "lm_eval",
            "task": _TASKS.get(name, name),
            **({"metric": "acc_norm"} if name in _NORMALIZED else {}),
        }
        for name in names
    }


_COMMON_SENSE = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "siqa", "winogrande")

TASK_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # arXiv 2507.17417, Table IX
    "paper": _hub("mmlu", "mathqa", "arc_challenge", "hellaswag", "winogrande", "boolq", "lambada", "piqa", "sst2"),
    # the eight of SpinQuant (arXiv 2405.16406) and ResQ (arXiv 2412.14363); OSTQuant (arXiv
    # 2501.13987) reports nine, with LAMBADA
    "spinquant8": _hub(*_COMMON_SENSE),
    "ostquant9": _hub(*_COMMON_SENSE, "lambada"),
    # built from Python's documentation: no hub, no files
    "offline": {kind: {"source": "builtin", "kind": kind, "items": 100} for kind in ("cloze", "continuation")},
}


def expanded(names: Iterable[str], entries: Mapping[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Expand the presets in a list of tasks; returns (task names, entries that they need). An entry
    of the config with the same name is kept."""
    found: dict[str, None] = {}
    needed: dict[str, dict[str, Any]] = {}
    for name in names:
        tasks = TASK_PRESETS[name] if name in TASK_PRESETS and name not in entries else {name: None}
        found |= dict.fromkeys(tasks)
        needed |= {task: dict(entry) for task, entry in tasks.items() if entry and task not in entries}
    return list(found), needed
