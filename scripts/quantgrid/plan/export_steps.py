"""Exports of a config: their steps. Standard library only.

An export reads the checkpoint of its cell, the unquantized model, windows for the check, and the
perplexities that its card shows. Its key covers the modules of its target.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ..config import entries, grid
from ..config.cells import AXES, Cell, baseline
from ..config.exports import Export, cell_name, exports
from ..exports.targets import target_of
from .race_steps import RaceSteps
from .steps import Step, once


class ExportSteps(RaceSteps):
    """Cells of a plan, their gates, their races and the exports that the config asks for."""

    @cached_property
    def exports(self) -> list[Export]:
        """Exports of the config, each once."""
        return exports(self.config, self.cells)

    def all_exports(self) -> list[str]:
        """List the folders of all exports; this makes their steps known to the rules."""
        return [self.export_model(export).outputs["folder"] for export in self.exports]

    @once
    def export_model(self, export: Export) -> Step:
        """Plan an export; the cell and full precision are evaluated on the corpus of its check, if a
        study of the cell measures perplexity."""
        cell, quantized, corpus = export.cell, self.quantize_model(export.cell), self._measured_on(export.cell)
        windows = (
            self.tokenize_all(cell.model, corpus) if corpus else self.tokenize_corpus(cell.model, self._gate_corpus)
        )
        reads = {
            "model": (self.fetch_model(cell.model), "folder"),
            "checkpoint": (quantized, "checkpoint"),
            "manifest": (quantized, "manifest"),
            "windows": (windows, "windows"),
        }
        if corpus:
            reads["measured"] = (self.merge_shards(cell, corpus), "result")
            reads["baseline"] = (self.merge_shards(baseline(cell.model), corpus), "result")
        return self._step(
            "export_model",
            {
                "to": export.target,
                "flags": list(export.flags),
                "about": {"name": export.name, **self._about(cell, corpus or self._gate_corpus)},
            },
            reads,
            {"target": f"exports.{target_of(export.target).route}"},
            ("torch", "transformers", "safetensors"),
            **cell.axes,
            to=export.target,
        )

    def _measured_on(self, cell: Cell) -> str:
        """First corpus on which a study of the cell measures perplexity; empty if none does."""
        asked = (
            grid.asked(self.config, self.config["studies"][name])
            for name, cells in self.studies.items()
            if cell in cells
        )
        return next((corpus for found in asked for corpus in found["perplexity"]), "")

    def _about(self, cell: Cell, corpus: str) -> dict[str, Any]:
        """Facts about the cell for the card and quantgrid.yaml."""
        config, used = self.config, {}
        for axis in ("transforms", "mitigations", "formats"):
            used[AXES[axis]] = entries.without_note(entries.entry(config, axis, getattr(cell, AXES[axis])))
        calibrations = {
            name: config["calibrations"][name]
            for name in dict.fromkeys(used[axis].get("calibration", "default") for axis in ("transform", "mitigation"))
        }
        corpora = dict.fromkeys([*(entry["corpus"] for entry in calibrations.values()), corpus])
        return {
            "cell": cell_name(cell),
            "model": cell.model,
            "entry": entries.without_note(config["models"][cell.model]),
            "config": {
                **used,
                "granularity": cell.granularity,
                "corpora": {name: self._corpus(name) for name in corpora},
            },
            "calibration": calibrations,
            "corpus": corpus,
            "windows": self.windows(corpus),
            "key": self.quantize_model(cell).key,
        }

    def _corpus(self, name: str) -> dict[str, Any]:
        """Entry of a corpus, without a path of this machine."""
        entry = entries.without_note(self.config["corpora"][name])
        return {key: value for key, value in entry.items() if key != "path"}
