"""Which checks stand before a model: what ``check_model`` reads and is told, and which jobs wait for it. Standard library only.

A check decides whether a cell is computed, not what comes out of it, so it is no part of any key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from . import grid
from .pipeline import Plan
from .provenance import canonical, code_hash


class Gates:
    """The checks of all models of a plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.pattern, self.digest = plan.pattern("check_model", "result"), plan.digest("check_model")

    def of_cell(self, pattern: str) -> Callable[[Any], list[str]]:
        """Checks to pass before a cell is quantized, as ``pattern`` or ``digest``; none for full precision, which the checks read."""
        return lambda wildcards: [pattern.format(model=wildcards.model)] if wildcards.mitigation != "none" else []

    def of_study(self, pattern: str, study: str) -> list[str]:
        """The checks of all models of a study, ``pattern`` or ``digest``: without them there is no table."""
        return [pattern.format(model=model) for model in dict.fromkeys(cell.model for cell in self.plan.studies[study])]

    @cached_property
    def calibrated(self) -> dict[str, list[str]]:
        """Model -> names of the corpora that its cells are calibrated on."""
        config, found = self.plan.config, {}
        for cell in self.plan.cells:
            names = found.setdefault(cell.model, {})
            for axis, name, step in (("transforms", cell.transform, self.plan.fit_transform(cell)),
                                     ("mitigations", cell.mitigation, self.plan.quantize_model(cell))):
                if {"statistics", "windows"} & step.inputs.keys():
                    names[config["calibrations"][grid.entry(config, axis, name).get("calibration", "default")]["corpus"]] = None
        return {model: list(names) for model, names in found.items()}

    def evaluated(self, model: str) -> list[str]:
        """Names of the corpora that perplexity of a model is measured on."""
        config, plan = self.plan.config, self.plan
        studies = [config["studies"][study] for study, cells in plan.studies.items() if any(cell.model == model for cell in cells)]
        return list(dict.fromkeys(corpus for study in studies for corpus in grid.asked(config, study)["perplexity"]))

    def published(self, model: str) -> dict[str, float]:
        """Corpus -> published full-precision perplexity, for the corpora that the model is evaluated on."""
        return {corpus: value for corpus, value in self.plan.config["models"][model].get("published", {}).items() if corpus in self.evaluated(model)}

    def inputs(self, model: str) -> dict[str, list[str]]:
        """Windows of either kind of corpus, the full-precision perplexities that have a published value, and the records of their content."""

        def windows(corpora: list[str]) -> list[str]:
            return [self.plan.tokenize_corpus(model, corpus).outputs["windows"] for corpus in corpora]

        measured = [self.plan.evaluate_perplexity(grid.baseline(model), corpus).outputs["result"] for corpus in self.published(model)]
        found = {"calibrations": windows(self.calibrated[model]), "evaluations": windows(self.evaluated(model)), "measured": measured}
        return {**found, "digests": self.plan.digests(path for paths in found.values() for path in paths)}

    def spec(self, model: str) -> str:
        """What ``check_model`` is told, as canonical JSON; names are in the order of its inputs."""
        return canonical({"model": model, "calibrations": self.calibrated[model], "evaluations": self.evaluated(model),
                          "published": list(self.published(model).items()), "code": code_hash("check_model")})
