"""Plan of a whole config: cells, their steps, specifications of reports. Standard library
only.

The rules of the workflow look up their steps here, by key; :mod:`.cell_steps` and
:mod:`.evaluation_steps` define the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

from ..config import allocations, entries, grid, registry, shown_transforms
from ..config.cells import AXES, Cell
from ..ground.provenance import canonical, code_hash, digest, versions
from . import subconfig
from .export_steps import ExportSteps
from .steps import Step, once

SHOWN_BY = {"tabulate_study": ("table",), "plot_study": ("figure",), "compare_study": ("table", "compare")}


class Plan(ExportSteps):
    """All cells of one validated config, with their steps and the files made from them."""

    def evaluations(self, study: str, ends: Sequence[Mapping[str, Any]] = ()) -> dict[Cell, dict[str, str]]:
        """Map cell -> evaluation -> path of its JSON, for all evaluations of a study.

        ``ends`` are the decisions that end its races. Candidates that they keep have all
        evaluations, the others their errors alone, and those that are not quantized none.
        """
        found = {**self.possible_evaluations(study)}
        for race, end in zip_longest(self.raced.get(study, ()), ends):
            entered, kept = race.entered(end), end["survivors"] if end else ()
            for cell in (cell for cell in race.candidates if cell.path not in kept):
                found[cell] = {"error": found[cell]["error"]} if cell in entered else {}
        return found

    @cached_property
    def certain(self) -> list[Cell]:
        """List the cells that are quantized whatever races predict of their errors."""
        named = {cell for study in self.studies for cell, paths in self.evaluations(study).items() if paths}
        return [cell for cell in self.cells if cell in named]

    @once
    def possible_evaluations(self, study: str) -> dict[Cell, dict[str, str]]:
        """Map cell -> evaluation -> path of its JSON, as if all candidates of a race were finalists."""
        asked = grid.asked(self.config, self.config["studies"][study])
        errors = {cell: self.measured(race, cell) for race in self.raced.get(study, ()) for cell in race.candidates}
        found: dict[Cell, dict[str, str]] = {}
        for cell in self.studies[study]:
            found[cell] = {"error": errors.get(cell) or self.quantize_model(cell).outputs["error"]}
            for corpus in asked["perplexity"]:
                found[cell][f"perplexity.{corpus}"] = self.merge_shards(cell, corpus).outputs["result"]
            if asked["tasks"]:
                found[cell]["tasks"] = self.evaluate_tasks(cell, tuple(asked["tasks"])).outputs["result"]
            if cell.quantized:
                for corpus in asked["residual_error"]:
                    found[cell][f"residual_error.{corpus}"] = self.measure_residual_error(cell, corpus).outputs[
                        "result"
                    ]
        return found

    @once
    def all_evaluations(self) -> list[str]:
        """Plan every evaluation and every gate of every cell of every study; this makes all steps known
        to the rules."""
        for cell in self.cells:
            self.gates(cell)
        for race in (race for races in self.raced.values() for race in races):
            self.decisions(race)
        return list(
            dict.fromkeys(
                path for study in self.studies for paths in self.evaluations(study).values() for path in paths.values()
            )
        )

    def all_steps(self) -> dict[str, list[Step]]:
        """Map each rule to every step of every cell, of the transforms shown in the report, and of the exports."""
        self.all_evaluations()
        self.distributions()
        self.all_exports()
        return {rule: list(steps.values()) for rule, steps in self.steps.items()}

    def measures_residual_error(self) -> bool:
        """Check whether a study measures the residual error, if only of what its races keep."""
        found = (paths for study in self.studies for paths in self.possible_evaluations(study).values())
        return any(name.startswith("residual_error.") for paths in found for name in paths)

    def residual_errors(self, ends: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """List the paths of all measurements of the residual error; ``ends``: study -> the
        decisions that end its races."""
        return list(
            dict.fromkeys(
                path
                for study in self.studies
                for paths in self.evaluations(study, ends.get(study, ())).values()
                for name, path in paths.items()
                if name.startswith("residual_error.")
            )
        )

    def allocations(self) -> list[str]:
        """List the paths of the errors of all allocated cells."""
        return [
            self.quantize_model(cell).outputs["error"]
            for cell in self.certain
            if allocations.is_allocated(self.config, cell)
        ]

    def trainings(self) -> dict[str, str]:
        """Map the name of each training to the path of its losses, for learned transforms and
        trained mitigations."""
        found = {}
        for cell in self.certain:
            if registry.method(
                "transforms", entries.entry(self.config, "transforms", cell.transform)["method"]
            ).learned:
                step = self.fit_transform(cell)
                model, transform, target = (step.wildcards[axis] for axis in ("model", "transform", "target"))
                found[", ".join([model, transform, *([target] if target != "any" else [])])] = step.outputs["losses"]
        return found | {
            ", ".join(cell.axes.values()): self.quantize_model(cell).outputs["losses"]
            for cell in self.certain
            if self.trains(cell)
        }

    def distributions(self) -> dict[str, list[str]]:
        """Map each model to the paths of the distributions of the transforms in
        ``report.distributions``; empty without that key, and without models whose layers have other
        sites than one of each kind: the figures are by channel, and experts have different ones."""
        cells = [cell for cell in self.cells if entries.shape(self.config, cell.model).has_plain_sites]
        shown = shown_transforms.shown(self.config, cells)
        return {
            model: [self.measure_distributions(cell).outputs["distribution"] for cell in cells]
            for model, cells in shown.items()
        }

    # -- reporting ---------------------------------------------------------------------------------

    def study_inputs(self, study: str, ends: Sequence[Mapping[str, Any]] = ()) -> list[str]:
        """List the paths of all evaluations of a study (:meth:`evaluations`)."""
        found = self.evaluations(study, ends)
        return list(dict.fromkeys(path for paths in found.values() for path in paths.values()))

    def study_spec(self, study: str) -> str:
        """Build the specification of ``collect_study`` as canonical JSON: the study and the part of
        the config that determines its cells.

        The list of its files can exceed the length of a command line, so the job rebuilds it from
        these.
        """
        return canonical(
            {
                "study": study,
                "config": subconfig.of_study(self.config, study, self.studies[study]),
                "code": code_hash("collect_study"),
            }
        )

    def all_checkpoints(self) -> list[str]:
        """List the packed checkpoint of every cell of ``certain`` with its manifest."""
        return [
            path
            for cell in self.certain
            for name, path in self.quantize_model(cell).outputs.items()
            if name in ("checkpoint", "manifest")
        ]

    def steps_spec(self) -> str:
        """Build the specification of ``list_steps`` as canonical JSON: the part of the config that
        determines all steps, and a digest of their keys."""
        keys = {rule: sorted(step.key for step in steps) for rule, steps in self.all_steps().items()}
        return canonical(
            {"config": subconfig.whole(self.config), "code": code_hash("list_steps"), "keys": digest(keys, 16)}
        )

    def reporting_spec(self, rule: str, study: str | None = None) -> str:
        """Build the specification of a table, a figure, the merged results or the report as
        canonical JSON."""
        spec: dict[str, Any] = {"code": code_hash(rule)}
        if study is not None:
            entry = self.config["studies"][study]
            spec |= {
                "study": study,
                **{
                    key: entry[key] for key in ("title", "description", "paper", *AXES, *SHOWN_BY[rule]) if key in entry
                },
            }
            if entry["table"].get("seeds") == "merged" and "also" in entry:  # may name entries with seeds
                spec["also"] = entry["also"]
        elif rule == "plot_losses":
            spec["labels"] = list(self.trainings())
        elif rule == "plot_distributions":
            spec["figures"] = list(shown_transforms.FIGURES)
        elif rule == "plot_pareto":
            spec["formats"] = subconfig.named(self.config)["formats"]
        elif rule == "evaluate_claims":
            spec["config"] = subconfig.named(self.config)
        elif rule == "build_report":
            spec |= {
                "config": self.config,
                "versions": versions("torch", "transformers", "lm_eval", "snakemake", "numpy", "pandas"),
            }
        return canonical(spec)
