"""Steps behind a cell: specification, key, inputs and outputs of every rule. Standard library only.

This module alone defines the steps of the workflow, from the names of a cell down to a folder. The
specification contains everything that decides a step's output (resolved options, keys of the input
steps, code hash, versions, seed); the key is its hash; an output path is the readable axes followed
by that key.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from ..calibration.defaults import SENSITIVITY_WINDOWS
from ..config import entries, registry
from ..config.cells import Cell
from ..config.entries import without_note
from ..corpora import library_docs
from ..ground.provenance import canonical, code_hash, digest, fingerprint, solvers, versions
from ..models.folders import folder_of
from ..schemes.granularities import searched
from .rule_lookups import RuleLookUps
from .steps import COMPUTING, DIGESTS, GATES, OUTPUTS, Step, once


class CellSteps(RuleLookUps):
    """Base of ``pipeline.Plan``: the steps of one validated config, built on demand and indexed by
    rule and wildcards.

    The key alone does not identify a step: two names for the same options have the same key in two
    places.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.results = config["results_dir"].rstrip("/")
        self.steps: dict[str, dict[frozenset, Step]] = {rule: {} for rule in OUTPUTS}
        self._known: dict[tuple, Step] = {}
        self.records: dict[str, str] = {}  # output of a step -> record of its content
        self.made_by: dict[str, tuple[Step, str]] = {}  # output of a step -> the step, name of the output
        self.given: dict[tuple, Any] = {}

    def _step(
        self,
        rule: str,
        spec: dict[str, Any],
        reads: Mapping[str, tuple[Step, str]],
        modules: Mapping[str, str] | None = None,
        packages: tuple[str, ...] = ("torch",),
        **wildcards: str,
    ) -> Step:
        """Build (or look up) a step; ``reads`` maps an input name to the step and output that
        provide it. The compute settings are added to ``spec``.

        ``modules`` maps a role to the library module that the job runs in it: the key covers the
        module's content, not its path. The key of a gate covers the keys of its inputs only: a cell
        lists its gates among its inputs, and other paths would quantize it again. Snakemake runs the
        gate again where the rest of its specification changes.
        """
        if rule in COMPUTING:
            spec = {**spec, "compute": {**self.config["compute"], "threads": self.threads(rule)}}
        known = (rule, *wildcards.values(), canonical(spec))
        if known not in self._known:
            upstream = {name: f"{step.key}/{output}" for name, (step, output) in reads.items()}
            code = (rule, *(modules or {}).values())
            full = {
                **spec,
                "code": code_hash(*code),
                "versions": versions(*packages, *solvers(*code)),
                "upstream": upstream,
            }
            wildcards = {**wildcards, "key": digest(upstream if rule in GATES else full)}
            placed = {**full, "axes": wildcards, **({"modules": modules} if modules else {})}
            step = Step(
                rule,
                wildcards,
                placed,
                {name: step.outputs[output] for name, (step, output) in reads.items()},
                {name: f"{self.results}/{pattern.format(**wildcards)}" for name, pattern in OUTPUTS[rule].items()},
                f"{self.results}/{DIGESTS[rule].format(**wildcards)}",
                tuple(dict.fromkeys(step.digest for step, _ in reads.values())),
            )
            self.records |= dict.fromkeys(step.outputs.values(), step.digest)
            self.made_by |= {path: (step, name) for name, path in step.outputs.items()}
            self._known[known] = self.steps[rule][frozenset(wildcards.items())] = step
        return self._known[known]

    # -- the steps ---------------------------------------------------------------------------------

    @once
    def fetch_model(self, model: str) -> Step:
        entry = without_note(self.config["models"][model])
        folder = folder_of(entry, f"models.{model}")
        found = {"files": fingerprint(folder)} if folder else {}
        return self._step("fetch_model", {"model": entry, **found}, {}, packages=("transformers",), model=model)

    @once
    def tokenize_corpus(self, model: str, corpus: str) -> Step:
        return self._tokenize(model, corpus, without_note(self.config["corpora"][corpus]))

    @once
    def tokenize_all(self, model: str, corpus: str) -> Step:
        """Plan the tokenization of a corpus into all of its windows, of which evaluations take the
        first: more windows of an evaluation change no key."""
        entry = without_note(self.config["corpora"][corpus])
        return self._tokenize(model, corpus, {key: value for key, value in entry.items() if key != "windows"})

    def _tokenize(self, model: str, corpus: str, entry: Mapping[str, Any]) -> Step:
        found: dict[str, Any] = {}
        if entry["source"] == "builtin":
            found = {"python": platform.python_version()}
        elif entry["source"] == "library_docs":
            found = {"libraries": versions(*library_docs.PACKAGES.values())}
        elif entry["source"] == "local":
            found = {"files": fingerprint(entry["path"])}
        return self._step(
            "tokenize_corpus",
            {"corpus": entry, **found, "seed": self.config["seed"]},
            {"model": (self.fetch_model(model), "folder")},
            packages=("tokenizers", "transformers", "sentencepiece"),
            model=model,
            corpus=corpus,
        )

    @once
    def calibrate_model(self, model: str, calibration: str, half: str = "") -> Step:
        """Plan the statistics of a calibration; ``half`` (``first``, ``second``): of half of its windows."""
        entry = self.config["calibrations"][calibration]
        how = {name: entry[name] for name in ("samples", "skip_first", "experts")} | {"seed": self.config["seed"]}
        if half:
            how["half"] = half
        return self._step(
            "calibrate_model",
            how,
            {
                "model": (self.fetch_model(model), "folder"),
                "windows": (self.tokenize_corpus(model, entry["corpus"]), "windows"),
            },
            packages=("torch", "transformers"),
            model=model,
            calibration=calibration,
        )

    @once
    def fit_transform(self, cell: Cell) -> Step:
        entry = entries.entry(self.config, "transforms", cell.transform)
        method = registry.method("transforms", entry["method"])
        calibration = entry.pop("calibration", "default")
        spec = {"transform": {"learned": method.learned, **method.resolve(entry, f"transforms.{cell.transform}")}}
        options, target = spec["transform"]["options"], "any"
        if method.seeded:
            spec["seed"] = entry.get("seed", self.config["seed"])
        if method.is_fitted_to_scheme(options):
            spec["schemes"] = entries.resolved_schemes(self.config, cell)
            target = f"{cell.format}-{cell.granularity}"
        reads, corpus = (
            {"model": (self.fetch_model(cell.model), "folder")},
            self.config["calibrations"][calibration]["corpus"],
        )
        if method.is_calibrated(options):
            reads["statistics"] = (self.calibrate_model(cell.model, calibration), "statistics")
        if method.trained_on_windows:
            reads["windows"] = (self.tokenize_corpus(cell.model, corpus), "windows")
        return self._step(
            "fit_transform",
            spec,
            reads,
            {"transform": method.module},
            ("torch", "transformers") if "windows" in reads else ("torch",),
            model=cell.model,
            transform=cell.transform,
            target=target,
        )

    @once
    def measure_distributions(self, cell: Cell) -> Step:
        """Plan the measurement of inputs and weights under the cell's transform, always on the
        calibration ``default``."""
        fitted = self.fit_transform(cell)
        reads = {
            "model": (self.fetch_model(cell.model), "folder"),
            "transform": (fitted, "transform"),
            "statistics": (self.calibrate_model(cell.model, "default"), "statistics"),
        }
        return self._step(
            "measure_distributions",
            {},
            reads,
            model=cell.model,
            transform=cell.transform,
            target=fitted.wildcards["target"],
        )

    @once
    def quantize_model(self, cell: Cell) -> Step:
        """Plan the step that writes a cell's checkpoint; a trained mitigation has a separate
        rule."""
        method, calibration, _ = self._mitigation(cell.mitigation)
        if method.training:
            return self._train_mitigation(cell)
        spec, propagation = self._solved(cell)
        reads = self._cell_inputs(cell)
        if propagation is None or spec["schemes"]["weight"] is None:
            return self._step("quantize_model", spec, reads, {"mitigation": method.module}, **cell.axes)  # type: ignore[arg-type]
        given = self.config["calibrations"][calibration]
        spec["propagation"] = {**propagation, "skip_first": given["skip_first"]}
        reads["windows"] = (self.tokenize_corpus(cell.model, given["corpus"]), "windows")
        modules = {"mitigation": method.module, "propagation": registry.SEQUENTIAL}
        return self._step("quantize_model", spec, reads, modules, ("torch", "transformers"), **cell.axes)

    @once
    def _mitigation(self, name: str) -> tuple[registry.Method, str, dict[str, Any]]:
        """Find method, name of the calibration, and resolved options of a mitigation."""
        entry = entries.entry(self.config, "mitigations", name)
        calibration = entry.pop("calibration", "default")
        method = registry.method("mitigations", entry["method"])
        return method, calibration, method.resolve(entry, f"mitigations.{name}")

    def _solved(self, cell: Cell) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Specification of a job that solves the linears of a cell; options of its propagation."""
        _, _, resolved = self._mitigation(cell.mitigation)
        mitigation, propagation = registry.split_propagation(resolved)
        where = f"mitigations.{cell.mitigation} on format '{cell.format}'"
        schemes = searched(entries.resolved_schemes(self.config, cell), resolved["options"], where)
        return {"mitigation": mitigation, "schemes": schemes}, propagation

    def _cell_inputs(self, cell: Cell, half: str = "") -> dict[str, tuple[Step, str]]:
        """Inputs of a job that quantizes a cell from cached statistics, of a ``half`` of the
        windows or of all."""
        reads = {
            "model": (self.fetch_model(cell.model), "folder"),
            "transform": (self.fit_transform(cell), "transform"),
        }
        if cell.quantized:
            _, calibration, _ = self._mitigation(cell.mitigation)
            reads["statistics"] = (self.calibrate_model(cell.model, calibration, half), "statistics")
        return reads

    def trains(self, cell: Cell) -> str:
        """Return what the mitigation of a cell trains: ``scales``, ``weights`` or nothing
        (empty)."""
        return registry.method(
            "mitigations", entries.entry(self.config, "mitigations", cell.mitigation)["method"]
        ).training

    @once
    def measure_sensitivity(self, model: str, calibration: str) -> Step:
        """Plan the sensitivities of a model, on the first windows of a calibration."""
        entry = self.config["calibrations"][calibration]
        return self._step(
            "measure_sensitivity",
            {"skip_first": entry["skip_first"], "windows": SENSITIVITY_WINDOWS, "seed": self.config["seed"]},
            {
                "model": (self.fetch_model(model), "folder"),
                "windows": (self.tokenize_corpus(model, entry["corpus"]), "windows"),
            },
            packages=("torch", "transformers"),
            model=model,
            calibration=calibration,
        )

    def _train_mitigation(self, cell: Cell) -> Step:
        method, calibration, resolved = self._mitigation(cell.mitigation)
        spec = {
            "mitigation": resolved,
            "schemes": entries.resolved_schemes(self.config, cell),
            "training": method.training,
            "seed": entries.entry(self.config, "mitigations", cell.mitigation).get("seed", self.config["seed"]),
        }
        corpus = self.config["calibrations"][calibration]["corpus"]
        reads = {**self._cell_inputs(cell), "windows": (self.tokenize_corpus(cell.model, corpus), "windows")}
        if method.weights_channels(resolved["options"]):
            reads["sensitivities"] = (self.measure_sensitivity(cell.model, calibration), "sensitivities")
        return self._step(
            "train_mitigation", spec, reads, {"mitigation": method.module}, ("torch", "transformers"), **cell.axes
        )
