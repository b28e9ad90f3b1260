"""The steps behind the cells: for every rule its specification, its key, its inputs and its outputs. Standard library only.

Every step of the workflow is described once, here, from the names of a cell down to a folder: the specification holds all that
decides the step's output (resolved options, keys of the steps it reads, code hash, versions, seed), the key is its hash, and the
output paths are the readable axes followed by that key. The rules of the workflow look their steps up by key.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import grid, registry, shown_transforms
from .grid import Cell, without_note
from .provenance import canonical, code_hash, digest, fingerprint, versions

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
}
SHOWN_BY = {"tabulate_study": ("table",), "plot_study": ("figure",), "compare_study": ("table", "compare")}
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


class Plan:
    """All steps of one validated config, made on demand and kept by rule and wildcards.

    The key alone does not tell two steps apart: two names for the same options give the same key at two places.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.results = config["results_dir"].rstrip("/")
        self.steps: dict[str, dict[frozenset, Step]] = {rule: {} for rule in OUTPUTS}
        self._known: dict[tuple, Step] = {}

    @cached_property
    def studies(self) -> dict[str, list[Cell]]:
        """Study name -> its cells."""
        return {name: grid.study_cells(self.config, name) for name in self.config["studies"]}

    @cached_property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for cells in self.studies.values() for cell in cells))

    # -- paths and look-ups for the rules -------------------------------------------------------------------------------------

    def pattern(self, rule: str, output: str) -> str:
        """Output path of a rule with its wildcards, as a rule declares it."""
        return f"{self.results}/{OUTPUTS[rule][output]}"

    def inputs(self, rule: str) -> Callable[[Any], Mapping[str, str]]:
        """Input function of a rule: wildcards -> named paths; an input that this step does without is an empty list."""
        without = {name: [] for name in OPTIONAL_INPUTS.get(rule, ())}
        return lambda wildcards: {**without, **self.steps[rule][frozenset(wildcards.items())].inputs}

    def spec(self, rule: str) -> Callable[[Any], str]:
        """Function of a rule's wildcards that gives the job's specification as canonical JSON."""
        return lambda wildcards: canonical(self.steps[rule][frozenset(wildcards.items())].spec)

    def _step(self, rule: str, spec: dict[str, Any], reads: Mapping[str, tuple[Step, str]], modules: tuple[str, ...] = (),
              packages: tuple[str, ...] = ("torch",), **wildcards: str) -> Step:
        """Make (or find) a step; ``reads`` maps an input name to the step and the output that it comes from."""
        known = (rule, *wildcards.values(), canonical(spec))
        if known not in self._known:
            upstream = {name: f"{step.key}/{output}" for name, (step, output) in reads.items()}
            full = {**spec, "code": code_hash(rule, *modules), "versions": versions(*packages), "upstream": upstream}
            wildcards = {**wildcards, "key": digest(full)}
            step = Step(rule, wildcards, {**full, "axes": wildcards}, {name: step.outputs[output] for name, (step, output) in reads.items()},
                        {name: f"{self.results}/{pattern.format(**wildcards)}" for name, pattern in OUTPUTS[rule].items()})
            self._known[known] = self.steps[rule][frozenset(wildcards.items())] = step
        return self._known[known]

    @property
    def _compute(self) -> dict[str, Any]:
        return {"compute": {**self.config["compute"], "threads": self.config["threads"]}}

    # -- the steps ------------------------------------------------------------------------------------------------------------

    def fetch_model(self, model: str) -> Step:
        entry = without_note(self.config["models"][model])
        found = {"files": fingerprint(entry["path"])} if entry["source"] == "local" else {}
        return self._step("fetch_model", {"model": entry, **found}, {}, packages=("transformers",), model=model)

    def tokenize_corpus(self, model: str, corpus: str) -> Step:
        entry = without_note(self.config["corpora"][corpus])
        if entry["source"] == "builtin":
            found = {"python": platform.python_version()}
        else:
            found = {"files": fingerprint(entry["path"])} if entry["source"] == "local" else {}
        return self._step("tokenize_corpus", {"corpus": entry, **found, "seed": self.config["seed"]},
                          {"model": (self.fetch_model(model), "folder")}, packages=("tokenizers",), model=model, corpus=corpus)

    def calibrate_model(self, model: str, calibration: str) -> Step:
        entry = self.config["calibrations"][calibration]
        return self._step("calibrate_model", {"samples": entry["samples"], "seed": self.config["seed"], **self._compute},
                          {"model": (self.fetch_model(model), "folder"),
                           "windows": (self.tokenize_corpus(model, entry["corpus"]), "windows")},
                          packages=("torch", "transformers"), model=model, calibration=calibration)

    def fit_transform(self, cell: Cell) -> Step:
        entry = grid.entry(self.config, "transforms", cell.transform)
        method = registry.method("transforms", entry["method"])
        calibration = entry.pop("calibration", "default")
        spec = {"transform": method.resolve(entry, f"transforms.{cell.transform}"), **self._compute}
        options, target = spec["transform"]["options"], "any"
        if method.seeded:
            spec["seed"] = entry.get("seed", self.config["seed"])
        if method.is_fitted_to_scheme(options):
            spec["schemes"] = grid.resolved_schemes(self.config, cell)
            target = f"{cell.format}-{cell.granularity}"
        reads = {"model": (self.fetch_model(cell.model), "folder")}
        if method.is_calibrated(options):
            reads["statistics"] = (self.calibrate_model(cell.model, calibration), "statistics")
        if method.trained_on_windows:
            reads["windows"] = (self.tokenize_corpus(cell.model, self.config["calibrations"][calibration]["corpus"]), "windows")
        return self._step("fit_transform", spec, reads, (method.module,), packages=("torch", "transformers") if "windows" in reads else ("torch",),
                          model=cell.model, transform=cell.transform, target=target)

    def describe_transform(self, cell: Cell) -> Step:
        """What the cell's transform makes of inputs and weights: on the calibration ``default``, whatever the transform was fitted on."""
        fitted = self.fit_transform(cell)
        return self._step("describe_transform", self._compute,
                          {"model": (self.fetch_model(cell.model), "folder"), "transform": (fitted, "transform"),
                           "statistics": (self.calibrate_model(cell.model, "default"), "statistics")},
                          model=cell.model, transform=cell.transform, target=fitted.wildcards["target"])

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
        mitigation, propagation = registry.split_propagation(method.resolve(entry, f"mitigations.{cell.mitigation}"))
        spec = {"mitigation": mitigation, "schemes": grid.resolved_schemes(self.config, cell), **self._compute}
        if propagation is None or spec["schemes"]["weight"] is None:
            return self._step("quantize_model", spec, reads, (method.module,), **cell.axes)
        reads["windows"] = (self.tokenize_corpus(cell.model, self.config["calibrations"][calibration]["corpus"]), "windows")
        return self._step("quantize_model", {**spec, "propagation": propagation}, reads, (method.module, registry.SEQUENTIAL),
                          packages=("torch", "transformers"), **cell.axes)

    def _train_model(self, cell: Cell, entry: Mapping[str, Any], calibration: str, method: registry.Method) -> Step:
        spec = {"mitigation": method.resolve(entry, f"mitigations.{cell.mitigation}"), "schemes": grid.resolved_schemes(self.config, cell),
                "training": method.training, "seed": entry.get("seed", self.config["seed"]), **self._compute}
        corpus = self.config["calibrations"][calibration]["corpus"]
        return self._step("train_model", spec,
                          {"model": (self.fetch_model(cell.model), "folder"), "transform": (self.fit_transform(cell), "transform"),
                           "statistics": (self.calibrate_model(cell.model, calibration), "statistics"),
                           "windows": (self.tokenize_corpus(cell.model, corpus), "windows")},
                          (method.module,), packages=("torch", "transformers"), **cell.axes)

    def evaluate_reference(self, model: str, corpus: str) -> Step:
        return self._step("evaluate_reference", {"batch_size": self.config["evaluation"]["batch_size"], **self._compute},
                          {"model": (self.fetch_model(model), "folder"), "windows": (self.tokenize_corpus(model, corpus), "windows")},
                          packages=("torch", "transformers"), model=model, corpus=corpus)

    def evaluate_perplexity(self, cell: Cell, corpus: str) -> Step:
        quantized = self.quantize_model(cell)
        return self._step("evaluate_perplexity", {"batch_size": self.config["evaluation"]["batch_size"], **self._compute},
                          {"model": (self.fetch_model(cell.model), "folder"), "checkpoint": (quantized, "checkpoint"),
                           "manifest": (quantized, "manifest"), "windows": (self.tokenize_corpus(cell.model, corpus), "windows"),
                           "reference": (self.evaluate_reference(cell.model, corpus), "reference")},
                          packages=("torch", "transformers"), corpus=corpus, **cell.axes)

    def evaluate_tasks(self, cell: Cell, tasks: tuple[str, ...]) -> Step:
        quantized = self.quantize_model(cell)
        entries = {name: without_note(self.config["tasks"][name]) for name in tasks}
        found = {name: fingerprint(entry["path"]) for name, entry in entries.items() if entry["source"] == "local"}
        found |= {name: platform.python_version() for name, entry in entries.items() if entry["source"] == "builtin"}
        spec = {"tasks": entries, "sources": found, "evaluation": self.config["evaluation"], "seed": self.config["seed"], **self._compute}
        return self._step("evaluate_tasks", spec,
                          {"model": (self.fetch_model(cell.model), "folder"), "checkpoint": (quantized, "checkpoint"),
                           "manifest": (quantized, "manifest")},
                          packages=("torch", "transformers", "lm_eval", "datasets"), **cell.axes)

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
        return found

    def all_evaluations(self) -> list[str]:
        """Every evaluation of every cell of every study; asking for them makes all steps known to the rules."""
        return list(dict.fromkeys(path for study in self.studies for paths in self.evaluations(study).values() for path in paths.values()))

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
        return {model: [self.describe_transform(cell).outputs["distribution"] for cell in cells]
                for model, cells in shown_transforms.shown(self.config, self.cells).items()}

    # -- reporting ------------------------------------------------------------------------------------------------------------

    def study_inputs(self, study: str) -> list[str]:
        """Paths of all evaluations of a study."""
        return list(dict.fromkeys(path for paths in self.evaluations(study).values() for path in paths.values()))

    def study_spec(self, study: str) -> str:
        """What ``collect_study`` is told: the study and the part of the config that its cells come from, as canonical JSON.

        The list of its files may be longer than a command line, so the job makes it again from these.
        """
        return canonical({"study": study, "config": self.study_config(study), "code": code_hash("collect_study")})

    def all_checkpoints(self) -> list[str]:
        """The packed checkpoint of every cell, with its manifest."""
        return [path for cell in self.cells for name, path in self.quantize_model(cell).outputs.items() if name in ("checkpoint", "manifest")]

    def study_config(self, study: str) -> dict[str, Any]:
        """The part of the config that decides which cells a study has and where their evaluations lie."""
        cells, asked = self.studies[study], self.config["studies"][study]
        part = {key: value for key, value in self.config.items() if key not in ("studies", "report")}
        for axis, singular in grid.AXES.items():
            if axis in part:  # a name that 'exclude' leaves no cell of has to be known all the same
                used = {getattr(cell, singular) for cell in cells} | {name for named, name, _ in grid.names_in(asked) if named == axis}
                part[axis] = {name: entry for name, entry in part[axis].items()
                              if used & {name, *grid.entry_names(self.config, axis, name, axis)}}
        wanted = grid.asked(self.config, self.config["studies"][study])
        read = {*wanted["perplexity"], *(entry["corpus"] for entry in part["calibrations"].values())}
        part |= {"corpora": {name: part["corpora"][name] for name in read}, "tasks": {name: part["tasks"][name] for name in wanted["tasks"]}}
        for kind in (*grid.AXES, "corpora", "tasks"):
            if kind in part:
                part[kind] = {name: without_note(entry) for name, entry in part[kind].items()}
        shown = ("title", "description", "paper", "table", "figure", "compare")
        part["studies"] = {study: {key: value for key, value in asked.items() if key not in shown}}
        return part

    def reporting_spec(self, rule: str, study: str | None = None) -> str:
        """What a table, a figure, the merged results or the report are told, as canonical JSON."""
        spec: dict[str, Any] = {"code": code_hash(rule)}
        if study is not None:
            entry = self.config["studies"][study]
            spec |= {"study": study, **{key: entry[key] for key in ("title", "description", "paper", *SHOWN_BY[rule]) if key in entry}}
        elif rule == "plot_losses":
            spec["labels"] = list(self.trainings())
        elif rule == "plot_distributions":
            spec["figures"] = list(shown_transforms.FIGURES)
        elif rule == "build_report":
            spec |= {"config": self.config, "versions": versions("torch", "transformers", "lm_eval", "snakemake", "numpy", "pandas")}
        return canonical(spec)
