"""Evaluations of a cell: their steps, in shards of windows. Standard library only.

Every evaluation reads all windows of a corpus and takes its own, so that its key does not depend on
their number.
"""

from __future__ import annotations

import platform
from typing import Any

from ..config.cells import Cell
from ..config.entries import without_note
from ..ground.provenance import fingerprint
from ..machine.chunks import windows_per_batch
from .cell_steps import CellSteps
from .shards import Shard, shards
from .steps import Step, once

_NOT_OF_TASKS = ("residual_error_windows", "shard_windows")  # keys of `evaluation`


class EvaluationSteps(CellSteps):
    """Steps of cells and their evaluations."""

    def shards(self, corpus: str) -> list[Shard]:
        """List the shards of the evaluations on ``corpus``."""
        how = self.config["evaluation"]
        return shards(self.windows(corpus), how["shard_windows"], windows_per_batch(how["batch_size"]))

    def windows(self, corpus: str) -> int | None:
        """Return the number of windows of an evaluation on ``corpus``; None for all of them."""
        return self.config["corpora"][corpus].get("windows")

    @once
    def evaluate_reference(self, model: str, corpus: str, shard: Shard) -> Step:
        return self._step(
            "evaluate_reference",
            self._part(shard),
            {
                "model": (self.fetch_model(model), "folder"),
                "windows": (self.tokenize_all(model, corpus), "windows"),
            },
            packages=("torch", "transformers"),
            model=model,
            corpus=corpus,
            shard=str(shard),
        )

    @once
    def evaluate_perplexity(self, cell: Cell, corpus: str, shard: Shard) -> Step:
        quantized = self.quantize_model(cell)
        return self._step(
            "evaluate_perplexity",
            self._part(shard),
            {
                "model": (self.fetch_model(cell.model), "folder"),
                "checkpoint": (quantized, "checkpoint"),
                "manifest": (quantized, "manifest"),
                "windows": (self.tokenize_all(cell.model, corpus), "windows"),
                "reference": (self.evaluate_reference(cell.model, corpus, shard), "reference"),
            },
            packages=("torch", "transformers"),
            corpus=corpus,
            shard=str(shard),
            **cell.axes,  # type: ignore[arg-type]
        )

    def _part(self, shard: Shard) -> dict[str, Any]:
        """Settings of an evaluation of one shard."""
        return {
            "batch_size": windows_per_batch(self.config["evaluation"]["batch_size"]),
            "shard": {"start": shard.start, "stop": shard.stop},
        }

    @once
    def merge_shards(self, cell: Cell, corpus: str) -> Step:
        """Plan the evaluation of a cell on all of its windows of a corpus."""
        return self._step(
            "merge_shards",
            {"windows": self.windows(corpus)},
            {str(shard): (self.evaluate_perplexity(cell, corpus, shard), "result") for shard in self.shards(corpus)},
            packages=(),
            corpus=corpus,
            **cell.axes,  # type: ignore[arg-type]
        )

    @once
    def evaluate_tasks(self, cell: Cell, tasks: tuple[str, ...]) -> Step:
        quantized = self.quantize_model(cell)
        asked = {name: without_note(self.config["tasks"][name]) for name in tasks}
        found: dict[str, Any] = {
            name: fingerprint(entry["path"]) for name, entry in asked.items() if entry["source"] == "local"
        }
        found |= {name: platform.python_version() for name, entry in asked.items() if entry["source"] == "builtin"}
        how = {key: value for key, value in self.config["evaluation"].items() if key not in _NOT_OF_TASKS}
        spec = {"tasks": asked, "sources": found, "evaluation": how, "seed": self.config["seed"]}
        return self._step(
            "evaluate_tasks",
            spec,
            {
                "model": (self.fetch_model(cell.model), "folder"),
                "checkpoint": (quantized, "checkpoint"),
                "manifest": (quantized, "manifest"),
            },
            packages=("torch", "transformers", "lm_eval", "datasets"),
            **cell.axes,  # type: ignore[arg-type]
        )

    @once
    def measure_residual_error(self, cell: Cell, corpus: str) -> Step:
        quantized = self.quantize_model(cell)
        first, available = self.config["evaluation"]["residual_error_windows"], self.windows(corpus)
        return self._step(
            "measure_residual_error",
            {"windows": first if available is None else min(first, available)},
            {
                "model": (self.fetch_model(cell.model), "folder"),
                "transform": (self.fit_transform(cell), "transform"),
                "checkpoint": (quantized, "checkpoint"),
                "manifest": (quantized, "manifest"),
                "windows": (self.tokenize_all(cell.model, corpus), "windows"),
            },
            packages=("torch", "transformers"),
            corpus=corpus,
            **cell.axes,  # type: ignore[arg-type]
        )
