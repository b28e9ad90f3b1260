"""Steps behind an allocation of bits: sensitivities of a model, errors of its linears under the candidate
schemes, the allocation within a budget, and the quantization that reads it. Standard library only.

Another budget, or another number of alternatives, changes the allocation and the cells that read it, and
neither sensitivities nor errors.
"""

from __future__ import annotations

from ..config import allocations
from ..config.cells import Cell
from .evaluation_steps import EvaluationSteps
from .steps import Step, once

SOLVED, MEASURED = "first", "second"  # halves of the windows of a calibration


class AllocationSteps(EvaluationSteps):
    """Cell steps, with those of cells whose linears get one of several schemes."""

    @once
    def quantize_model(self, cell: Cell) -> Step:
        """Plan the step that writes a cell's checkpoint; that of an allocated cell reads its allocation."""
        if not allocations.is_allocated(self.config, cell):
            return super().quantize_model(cell)
        method, _, _ = self._mitigation(cell.mitigation)
        spec, _ = self._solved(cell)
        spec["rank"] = allocations.allocation_of(self.config, cell)["rank"]
        reads = {**self._cell_inputs(cell), "allocation": (self.allocate_bits(cell), "allocation")}
        return self._step("quantize_model", spec, reads, {"mitigation": method.module}, **cell.axes)  # type: ignore[arg-type]

    @once
    def measure_schemes(self, cell: Cell) -> Step:
        """Plan the errors of all linears under the candidates of an allocated cell.

        A mitigation that reads statistics solves with those of one half of the windows, and its errors are
        measured on the other half.
        """
        method, calibration, _ = self._mitigation(cell.mitigation)
        spec, _ = self._solved(cell)
        reads = self._cell_inputs(cell, SOLVED if method.reads_statistics else "")
        if method.reads_statistics:
            reads["held_out"] = (self.calibrate_model(cell.model, calibration, MEASURED), "statistics")
        spec["schemes"] = {key: value for key, value in spec["schemes"].items() if key != "tied"}
        return self._step(
            "measure_schemes",
            spec,
            reads,
            {"mitigation": method.module},
            model=cell.model,
            transform=cell.transform,
            mitigation=cell.mitigation,
        )

    @once
    def allocate_bits(self, cell: Cell) -> Step:
        """Plan the allocation of a cell and of its alternatives."""
        given = allocations.allocation_of(self.config, cell)
        _, calibration, _ = self._mitigation(cell.mitigation)
        return self._step(
            "allocate_bits",
            {"allocate": {key: given[key] for key in ("budget", "divergence", "groups", "alternatives")}},
            {
                "model": (self.fetch_model(cell.model), "folder"),
                "sensitivities": (self.measure_sensitivity(cell.model, calibration), "sensitivities"),
                "errors": (self.measure_schemes(cell), "errors"),
            },
            packages=(),
            model=cell.model,
            transform=cell.transform,
            mitigation=cell.mitigation,
            format=allocations.base_name(self.config, cell.format),
        )
