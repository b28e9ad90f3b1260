"""Reading and validation of a config: one message lists all mistakes, before any job exists.

First the JSON schema (:mod:`.schema_mistakes`): unknown keys, wrong types, numbers out of range.
Then the checks beyond a schema: references, options of methods, contradictory cells, folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..calibration.defaults import SAMPLES
from ..ground.documents import read_yaml
from ..ground.errors import ConfigError
from . import grid, inputs, paths, study_defaults
from .entry_mistakes import name_mistakes, path_mistakes
from .exports import export_mistakes
from .mistakes import refuse
from .races import race_defaults
from .schema_mistakes import schema_mistakes
from .study_mistakes import study_mistakes
from .task_presets import expanded

DEFAULTS: dict[str, Any] = {
    "results_dir": paths.RESULTS,
    "seed": 0,
    "threads": 1,
    "keep_checkpoints": False,
    "transforms": {},
    "mitigations": {},
    "formats": {},
    "tasks": {},
    "compute": {"device": "auto", "dtype": "auto", "solver_dtype": "auto"},
    "evaluation": {"batch_size": 8, "task_limit": None, "residual_error_windows": 4, "shard_windows": 32},
    "evaluate": {"perplexity": [], "tasks": [], "residual_error": []},
    "exports": [],
    "report": {"title": "quantgrid", "distributions": []},
}
CALIBRATION_DEFAULTS = {"samples": SAMPLES, "skip_first": 0, "experts": "routed"}


def read(path: str | Path) -> dict[str, Any]:
    """Read a YAML file without checking it; :class:`ConfigError` if it is not a mapping."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: the config is not a mapping; it holds the keys models, corpora, calibrations, studies, ..."
        )
    return content


def load(path: str | Path) -> dict[str, Any]:
    """Read and check the config of a YAML file, and fill in its defaults."""
    return check(read(path))


def check(content: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``content`` and fill in its defaults; raises one :class:`ConfigError` that lists all
    mistakes, a line each."""
    refuse(schema_mistakes(content))
    refuse(path_mistakes(content))
    config = _with_defaults(content)
    # each check relies on the ones before
    for mistakes in (name_mistakes, study_mistakes, inputs.mismatches, export_mistakes):
        refuse(mistakes(config))
    return config


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    config = {**deepcopy(DEFAULTS), **deepcopy(dict(content))}
    for key in ("compute", "evaluation", "evaluate", "report"):
        config[key] = {**DEFAULTS[key], **config[key]}
    for asked in (
        config["evaluate"],
        *(study["evaluate"] for study in config["studies"].values() if "evaluate" in study),
    ):
        if "tasks" in asked:
            asked["tasks"], needed = expanded(asked["tasks"], content.get("tasks", {}))
            config["tasks"] |= needed
    config["calibrations"] = {name: {**CALIBRATION_DEFAULTS, **entry} for name, entry in config["calibrations"].items()}
    for name, study in config["studies"].items():
        asked = grid.asked(config, study)
        study["table"] = study_defaults.table_defaults(study.get("table", {}), asked)
        study["figure"] = study_defaults.figure_defaults(study.get("figure", {}), asked)
        if "compare" in study:
            study["compare"] = study_defaults.compare_defaults(study["compare"], asked)
        if "race" in study:
            study["race"] = race_defaults(study["race"])
        study.setdefault("title", name.replace("_", " "))
    threads = config["threads"]
    config["threads"] = {
        "default": DEFAULTS["threads"],
        **(threads if isinstance(threads, dict) else {"default": threads}),
    }
    config["results_dir"] = paths.results_folder(config)
    return config
