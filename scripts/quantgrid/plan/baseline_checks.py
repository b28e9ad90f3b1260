"""Baseline checks of each model: their inputs and specifications, and the jobs that wait for them.
Standard library only.

A check decides whether a cell is computed, not its result, so it does not enter any key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..config import entries, grid
from ..config.cells import baseline
from ..ground.provenance import canonical, code_hash
from .pipeline import Plan


class BaselineChecks:
    """The checks of all models of a plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.pattern, self.digest = plan.pattern("check_baseline", "result"), plan.digest("check_baseline")

    def of_cell(self, pattern: str) -> Callable[[Any], list[str]]:
        """Input function: the check that a cell must pass before quantization, as ``pattern`` or
        ``digest``; empty for full precision, which the checks read."""
        return lambda wildcards: [pattern.format(model=wildcards.model)] if wildcards.mitigation != "none" else []

    def of_study(self, pattern: str, study: str) -> list[str]:
        """List the checks of all models of a study, as ``pattern`` or ``digest``; its table
        requires them."""
        return [pattern.format(model=model) for model in dict.fromkeys(cell.model for cell in self.plan.studies[study])]

    @cached_property
    def calibrated(self) -> dict[str, list[str]]:
        """Map each model to the corpora that its cells are calibrated on."""
        config = self.plan.config
        found: dict[str, dict[str, None]] = {}
        for cell in self.plan.cells:
            names = found.setdefault(cell.model, {})
            for axis, name, step in (
                ("transforms", cell.transform, self.plan.fit_transform(cell)),
                ("mitigations", cell.mitigation, self.plan.quantize_model(cell)),
            ):
                if {"statistics", "windows"} & step.inputs.keys():
                    names[
                        config["calibrations"][entries.entry(config, axis, name).get("calibration", "default")][
                            "corpus"
                        ]
                    ] = None
        return {model: list(names) for model, names in found.items()}

    def evaluated(self, model: str) -> list[str]:
        """List the corpora on which perplexity of a model is measured, or its cells are raced."""
        config, plan = self.plan.config, self.plan
        studies = [
            config["studies"][study]
            for study, cells in plan.studies.items()
            if any(cell.model == model for cell in cells)
        ]
        asked = [corpus for study in studies for corpus in grid.asked(config, study)["perplexity"]]
        return list(dict.fromkeys([*asked, *(study["race"]["windows"] for study in studies if "race" in study)]))

    def published(self, model: str) -> dict[str, float]:
        """Map the corpora of a model's evaluations to the published full-precision perplexity."""
        return {
            corpus: value
            for corpus, value in self.plan.config["models"][model].get("published", {}).items()
            if corpus in self.evaluated(model)
        }

    def inputs(self, model: str) -> dict[str, list[str]]:
        """List the windows of both kinds of corpora, the full-precision perplexities with a
        published value, and the records of their content."""

        plan = self.plan
        measured = [plan.merge_shards(baseline(model), corpus).outputs["result"] for corpus in self.published(model)]
        found = {
            "calibrations": [
                plan.tokenize_corpus(model, corpus).outputs["windows"] for corpus in self.calibrated[model]
            ],
            "evaluations": [plan.tokenize_all(model, corpus).outputs["windows"] for corpus in self.evaluated(model)],
            "measured": measured,
        }
        return {**found, "digests": plan.digests(path for paths in found.values() for path in paths)}

    def spec(self, model: str) -> str:
        """Build the specification of ``check_baseline`` as canonical JSON; names are in the order
        of its inputs."""
        return canonical(
            {
                "model": model,
                "calibrations": self.calibrated[model],
                "evaluations": self.evaluated(model),
                "windows": [self.plan.windows(corpus) for corpus in self.evaluated(model)],
                "published": list(self.published(model).items()),
                "code": code_hash("check_baseline"),
            }
        )
