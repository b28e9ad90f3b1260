"""The steps behind the cells: for every rule its specification, its key, its inputs and its outputs. Standard library only.

Every step of the workflow is described once, here, from the names of a cell down to a folder: the specification holds all that
decides the step's output (resolved options, keys of the steps it reads, code hash, versions, seed), the key is its hash, and the
output paths are the readable axes followed by that key. The rules of the workflow look their steps up by key.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from . import grid, library_docs, planned, registry, shown_transforms
from .granularities import searched
from .grid import Cell, without_note
from .model_shapes import folder_of
from .provenance import canonical, code_hash, digest, fingerprint, solvers, versions
from .rule_lookups import RuleLookUps
from .steps import COMPUTING, DIGESTS, OUTPUTS, Step, once

SHOWN_BY = {"tabulate_study": ("table",), "plot_study": ("figure",), "compare_study": ("table", "compare")}


class Plan(RuleLookUps):
    """All steps of one validated config, made on demand and kept by rule and wildcards.

    The key alone does not tell two steps apart: two names for the same options give the same key at two places.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.results = config["results_dir"].rstrip("/")
        self.steps: dict[str, dict[frozenset, Step]] = {rule: {} for rule in OUTPUTS}
        self._known: dict[tuple, Step] = {}
        self.records: dict[str, str] = {}  # output of a step -> the record of its content
        self.given: dict[tuple, Any] = {}

    @cached_property
    def studies(self) -> dict[str, list[Cell]]:
        """Study name -> its cells."""
        return {name: grid.study_cells(self.config, name) for name in self.config["studies"]}

    @cached_property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for cells in self.studies.values() for cell in cells))

    def _step(self, rule: str, spec: dict[str, Any], reads: Mapping[str, tuple[Step, str]], modules: tuple[str, ...] = (),
              packages: tuple[str, ...] = ("torch",), **wildcards: str) -> Step:
        """Make (or find) a step; ``reads`` maps an input name to the step and the output that it comes from. How it computes is added to ``spec``."""
        if rule in COMPUTING:
            spec = {**spec, "compute": {**self.config["compute"], "threads": self.threads(rule)}}
        known = (rule, *wildcards.values(), canonical(spec))
        if known not in self._known:
            upstream = {name: f"{step.key}/{output}" for name, (step, output) in reads.items()}
            full = {**spec, "code": code_hash(rule, *modules), "versions": versions(*packages, *solvers(rule, *modules)),
                    "upstream": upstream}
            wildcards = {**wildcards, "key": digest(full)}
            step = Step(rule, wildcards, {**full, "axes": wildcards}, {name: step.outputs[output] for name, (step, output) in reads.items()},
                        {name: f"{self.results}/{pattern.format(**wildcards)}" for name, pattern in OUTPUTS[rule].items()},
                        f"{self.results}/{DIGESTS[rule].format(**wildcards)}", tuple(dict.fromkeys(step.digest for step, _ in reads.values())))
            self.records |= dict.fromkeys(step.outputs.values(), step.digest)
            self._known[known] = self.steps[rule][frozenset(wildcards.items())] = step
        return self._known[known]

    # -- the steps ------------------------------------------------------------------------------------------------------------

    @once
    def fetch_model(self, model: str) -> Step:
        entry = without_note(self.config["models"][model])
        folder = folder_of(entry, f"models.{model}")
        found = {"files": fingerprint(folder)} if folder else {}
        return self._step("fetch_model", {"model": entry, **found}, {}, packages=("transformers",), model=model)

    @once
    def tokenize_corpus(self, model: str, corpus: str) -> Step:
        entry = without_note(self.config["corpora"][corpus])
        found: dict[str, Any] = {}
        if entry["source"] == "builtin":
            found = {"python": platform.python_version()}
        elif entry["source"] == "library_docs":
            found = {"libraries": versions(*library_docs.PACKAGES.values())}
        elif entry["source"] == "local":
            found = {"files": fingerprint(entry["path"])}
        return self._step("tokenize_corpus", {"corpus": entry, **found, "seed": self.config["seed"]},
                          {"model": (self.fetch_model(model), "folder")}, packages=("tokenizers", "transformers", "sentencepiece"), model=model,
                          corpus=corpus)

    @once
    def calibrate_model(self, model: str, calibration: str) -> Step:
        entry = self.config["calibrations"][calibration]
        how = {"samples": entry["samples"], "skip_first": entry["skip_first"], "seed": self.config["seed"]}
        return self._step("calibrate_model", how,
                          {"model": (self.fetch_model(model), "folder"), "windows": (self.tokenize_corpus(model, entry["corpus"]), "windows")},
                          packages=("torch", "transformers"), model=model, calibration=calibration)

    @once
    def fit_transform(self, cell: Cell) -> Step:
        entry = grid.entry(self.config, "transforms", cell.transform)
        method = registry.method("transforms", entry["method"])
        calibration = entry.pop("calibration", "default")
        spec = {"transform": {"module": method.module, "learned": method.learned, **method.resolve(entry, f"transforms.{cell.transform}")}}
        options, target = spec["transform"]["options"], "any"
        if method.seeded:
            spec["seed"] = entry.get("seed", self.config["seed"])
        if method.is_fitted_to_scheme(options):
            spec["schemes"] = grid.resolved_schemes(self.config, cell)
            target = f"{cell.format}-{cell.granularity}"
        reads, corpus = {"model": (self.fetch_model(cell.model), "folder")}, self.config["calibrations"][calibration]["corpus"]
        if method.is_calibrated(options):
            reads["statistics"] = (self.calibrate_model(cell.model, calibration), "statistics")
        if method.trained_on_windows:
            reads["windows"] = (self.tokenize_corpus(cell.model, corpus), "windows")
        return self._step("fit_transform", spec, reads, (method.module,), packages=("torch", "transformers") if "windows" in reads else ("torch",),
                          model=cell.model, transform=cell.transform, target=target)

    @once
    def describe_transform(self, cell: Cell) -> Step:
        """What the cell's transform makes of inputs and weights: on the calibration ``default``, whatever the transform was fitted on."""
        fitted = self.fit_transform(cell)
        reads = {"model": (self.fetch_model(cell.model), "folder"), "transform": (fitted, "transform"),
                 "statistics": (self.calibrate_model(cell.model, "default"), "statistics")}
        return self._step("describe_transform", {}, reads, model=cell.model, transform=cell.transform, target=fitted.wildcards["target"])

    @once
    def quantize_model(self, cell: Cell) -> Step:
        """The step that leaves a cell's checkpoint; a mitigation that trains has a rule of its own."""
        entry = grid.entry(self.config, "mitigations", cell.mitigation)
        calibration = entry.pop("calibration", "default")
        method = registry.method("mitigations", entry["method"])
        if method.training:
            return self._train_model(cell, entry, calibration, method)
        reads = {"model": (self.fetch_model(cell.model), "folder"), "transform": (self.fit_transform(cell), "transform")}
        if cell.quantized:
            reads["statistics"] = (self.calibrate_model(cell.model, calibration), "statistics")
        resolved, where = method.resolve(entry, f"mitigations.{cell.mitigation}"), f"mitigations.{cell.mitigation} on format '{cell.format}'"
        mitigation, propagation = registry.split_propagation(resolved)
        schemes = searched(grid.resolved_schemes(self.config, cell), resolved["options"], where)
        spec = {"mitigation": {"module": method.module, **mitigation}, "schemes": schemes}
        if propagation is None or schemes["weight"] is None:
            return self._step("quantize_model", spec, reads, (method.module,), **cell.axes)
        given = self.config["calibrations"][calibration]
        spec["propagation"] = {"module": registry.SEQUENTIAL, **propagation, "skip_first": given["skip_first"]}
        reads["windows"] = (self.tokenize_corpus(cell.model, given["corpus"]), "windows")
        return self._step("quantize_model", spec, reads, (method.module, registry.SEQUENTIAL), packages=("torch", "transformers"), **cell.axes)

    def _train_model(self, cell: Cell, entry: Mapping[str, Any], calibration: str, method: registry.Method) -> Step:
        resolved = method.resolve(entry, f"mitigations.{cell.mitigation}")
        spec = {"mitigation": {"module": method.module, **resolved}, "schemes": grid.resolved_schemes(self.config, cell), "training": method.training,
                "seed": entry.get("seed", self.config["seed"])}
        corpus = self.config["calibrations"][calibration]["corpus"]
        reads = {"model": (self.fetch_model(cell.model), "folder"), "transform": (self.fit_transform(cell), "transform"),
                 "statistics": (self.calibrate_model(cell.model, calibration), "statistics"),
                 "windows": (self.tokenize_corpus(cell.model, corpus), "windows")}
        return self._step("train_model", spec, reads, (method.module,), packages=("torch", "transformers"), **cell.axes)

    @once
    def evaluate_reference(self, model: str, corpus: str) -> Step:
        return self._step("evaluate_reference", {"batch_size": self.config["evaluation"]["batch_size"]},
                          {"model": (self.fetch_model(model), "folder"), "windows": (self.tokenize_corpus(model, corpus), "windows")},
                          packages=("torch", "transformers"), model=model, corpus=corpus)

    @once
    def evaluate_perplexity(self, cell: Cell, corpus: str) -> Step:
        quantized = self.quantize_model(cell)
        return self._step("evaluate_perplexity", {"batch_size": self.config["evaluation"]["batch_size"]},
                          {"model": (self.fetch_model(cell.model), "folder"), "checkpoint": (quantized, "checkpoint"),
                           "manifest": (quantized, "manifest"), "windows": (self.tokenize_corpus(cell.model, corpus), "windows"),
                           "reference": (self.evaluate_reference(cell.model, corpus), "reference")},
                          packages=("torch", "transformers"), corpus=corpus, **cell.axes)

    @once
    def evaluate_tasks(self, cell: Cell, tasks: tuple[str, ...]) -> Step:
        quantized = self.quantize_model(cell)
        entries = {name: without_note(self.config["tasks"][name]) for name in tasks}
        found = {name: fingerprint(entry["path"]) for name, entry in entries.items() if entry["source"] == "local"}
        found |= {name: platform.python_version() for name, entry in entries.items() if entry["source"] == "builtin"}
        how = {key: value for key, value in self.config["evaluation"].items() if key != "depth_windows"}
        spec = {"tasks": entries, "sources": found, "evaluation": how, "seed": self.config["seed"]}
        return self._step("evaluate_tasks", spec,
                          {"model": (self.fetch_model(cell.model), "folder"), "checkpoint": (quantized, "checkpoint"),
                           "manifest": (quantized, "manifest")},
                          packages=("torch", "transformers", "lm_eval", "datasets"), **cell.axes)

    @once
    def measure_depth(self, cell: Cell, corpus: str) -> Step:
        quantized = self.quantize_model(cell)
        return self._step("measure_depth", {"windows": self.config["evaluation"]["depth_windows"]},
                          {"model": (self.fetch_model(cell.model), "folder"), "transform": (self.fit_transform(cell), "transform"),
                           "checkpoint": (quantized, "checkpoint"), "manifest": (quantized, "manifest"),
                           "windows": (self.tokenize_corpus(cell.model, corpus), "windows")},
                          packages=("torch", "transformers"), corpus=corpus, **cell.axes)

    @once
    def evaluations(self, study: str) -> dict[Cell, dict[str, str]]:
        """Cell -> name of the evaluation -> path of its JSON, for all that a study asks for."""
        asked = grid.asked(self.config, self.config["studies"][study])
        found: dict[Cell, dict[str, str]] = {}
        for cell in self.studies[study]:
            found[cell] = {"error": self.quantize_model(cell).outputs["error"]}
            for corpus in asked["perplexity"]:
                found[cell][f"perplexity.{corpus}"] = self.evaluate_perplexity(cell, corpus).outputs["result"]
            if asked["tasks"]:
                found[cell]["tasks"] = self.evaluate_tasks(cell, tuple(asked["tasks"])).outputs["result"]
            if cell.quantized:
                found[cell] |= {f"depth.{corpus}": self.measure_depth(cell, corpus).outputs["result"] for corpus in asked["depth"]}
        return found

    def all_evaluations(self) -> list[str]:
        """Every evaluation of every cell of every study; asking for them makes all steps known to the rules."""
        return list(dict.fromkeys(path for study in self.studies for paths in self.evaluations(study).values() for path in paths.values()))

    def all_steps(self) -> dict[str, list[Step]]:
        """Rule -> every step of every cell, and of what the report shows of their transforms."""
        self.all_evaluations()
        self.distributions()
        return {rule: list(steps.values()) for rule, steps in self.steps.items()}

    def depths(self) -> list[str]:
        """Paths of all measurements of the error over depth."""
        return list(dict.fromkeys(path for study in self.studies for paths in self.evaluations(study).values() for name, path in paths.items()
                                  if name.startswith("depth.")))

    def trainings(self) -> dict[str, str]:
        """What a training is called -> path of its losses, for every learned transform and every mitigation that trains."""
        found = {}
        for cell in self.cells:
            if registry.method("transforms", grid.entry(self.config, "transforms", cell.transform)["method"]).learned:
                step = self.fit_transform(cell)
                model, transform, target = (step.wildcards[axis] for axis in ("model", "transform", "target"))
                found[", ".join([model, transform, *([target] if target != "any" else [])])] = step.outputs["losses"]
        return found | {", ".join(cell.axes.values()): self.quantize_model(cell).outputs["losses"] for cell in self.cells if self.trains(cell)}

    def trains(self, cell: Cell) -> str:
        """What the mitigation of a cell trains: ``scales``, ``weights``, or nothing (empty)."""
        return registry.method("mitigations", grid.entry(self.config, "mitigations", cell.mitigation)["method"]).training

    def distributions(self) -> dict[str, list[str]]:
        """Model -> paths of the descriptions of the transforms that ``report.distributions`` names; empty where it names none."""
        shown = shown_transforms.shown(self.config, self.cells)
        return {model: [self.describe_transform(cell).outputs["distribution"] for cell in cells] for model, cells in shown.items()}

    # -- reporting ------------------------------------------------------------------------------------------------------------

    def study_inputs(self, study: str) -> list[str]:
        """Paths of all evaluations of a study."""
        return list(dict.fromkeys(path for paths in self.evaluations(study).values() for path in paths.values()))

    def study_spec(self, study: str) -> str:
        """What ``collect_study`` is told: the study and the part of the config that its cells come from, as canonical JSON.

        The list of its files may be longer than a command line, so the job makes it again from these.
        """
        return canonical({"study": study, "config": planned.of_study(self.config, study, self.studies[study]), "code": code_hash("collect_study")})

    def all_checkpoints(self) -> list[str]:
        """The packed checkpoint of every cell, with its manifest."""
        return [path for cell in self.cells for name, path in self.quantize_model(cell).outputs.items() if name in ("checkpoint", "manifest")]

    def steps_spec(self) -> str:
        """What ``list_steps`` is told, as canonical JSON: the part of the config that decides all steps, and a digest of their keys."""
        keys = {rule: sorted(step.key for step in steps) for rule, steps in self.all_steps().items()}
        return canonical({"config": planned.whole(self.config), "code": code_hash("list_steps"), "keys": digest(keys, 16)})

    def reporting_spec(self, rule: str, study: str | None = None) -> str:
        """What a table, a figure, the merged results or the report are told, as canonical JSON."""
        spec: dict[str, Any] = {"code": code_hash(rule)}
        if study is not None:
            entry = self.config["studies"][study]
            spec |= {"study": study, **{key: entry[key] for key in ("title", "description", "paper", *grid.AXES, *SHOWN_BY[rule]) if key in entry}}
        elif rule == "plot_losses":
            spec["labels"] = list(self.trainings())
        elif rule == "plot_distributions":
            spec["figures"] = list(shown_transforms.FIGURES)
        elif rule == "evaluate_claims":
            spec["config"] = planned.named(self.config)
        elif rule == "build_report":
            spec |= {"config": self.config, "versions": versions("torch", "transformers", "lm_eval", "snakemake", "numpy", "pandas")}
        return canonical(spec)
