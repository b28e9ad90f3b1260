"""Gates of models and transforms: their steps, and the jobs that wait for them. Standard library only.

A gate decides whether a cell is computed, not its result, so it does not enter any key. Its own path
changes with what it compares, not with its code (``cell_steps.CellSteps._step``).
"""

from __future__ import annotations

from functools import cached_property

from ..config import entries, grid
from ..config.cells import Cell
from ..machine.memory import WHOLE, parameters
from .allocation_steps import AllocationSteps
from .steps import Step, once

FEW = 2  # decoder layers that the model gate runs of a model larger than ``WHOLE``


class GateSteps(AllocationSteps):
    """Cells of a plan and their gates, one for each model and one for each fit of a transform."""

    @cached_property
    def studies(self) -> dict[str, list[Cell]]:
        """Map each study to its cells."""
        return {name: grid.study_cells(self.config, name, valid=True) for name in self.config["studies"]}

    @cached_property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for cells in self.studies.values() for cell in cells))

    @property
    def _gate_corpus(self) -> str:
        """Corpus of the text of a gate: that of the default calibration.

        Snakemake quantizes again where the path of a gate changes, so a gate reads nothing that a
        quantized cell does not read as well.
        """
        return self.config["calibrations"]["default"]["corpus"]

    @once
    def gate_model(self, model: str) -> Step:
        """Plan the comparison of the streamed model with transformers' own."""
        large = 4 * parameters(entries.shape(self.config, model)) > WHOLE
        return self._step(
            "gate_model",
            {"layers": FEW if large else None, "seed": self.config["seed"]},
            {
                "model": (self.fetch_model(model), "folder"),
                "windows": (self.tokenize_corpus(model, self._gate_corpus), "windows"),
            },
            packages=("torch", "transformers"),
            model=model,
        )

    @once
    def gate_transform(self, cell: Cell) -> Step:
        """Plan the comparison of the transformed model with the model, once for each fit.

        A cell waits for the gate of the fit that it uses, so that neither a part of a run nor an edit
        of other cells fits or gates anything else.
        """
        fitted = self.fit_transform(cell)
        return self._step(
            "gate_transform",
            {"seed": self.config["seed"]},
            {
                "model": (self.fetch_model(cell.model), "folder"),
                "transform": (fitted, "transform"),
                "windows": (self.tokenize_corpus(cell.model, self._gate_corpus), "windows"),
            },
            packages=("torch", "transformers"),
            model=cell.model,
            transform=cell.transform,
            target=fitted.wildcards["target"],
        )

    @once
    def gates(self, cell: Cell) -> list[Step]:
        """List the gates that a cell has to pass before it is quantized; none for full precision."""
        if not cell.quantized:
            return []
        plain = entries.entry(self.config, "transforms", cell.transform)["method"] == "none"
        return [self.gate_model(cell.model), *([] if plain else [self.gate_transform(cell)])]

    @once
    def study_gates(self, study: str) -> list[Step]:
        """List the gates of all cells of a study."""
        return list({gate.digest: gate for cell in self.studies[study] for gate in self.gates(cell)}.values())
