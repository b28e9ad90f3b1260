"""Steps behind an allocation of bits: sensitivities of a model, errors of its linears under the candidate
schemes, the allocation within a budget, and the quantization that reads it. Standard library only.

Another budget, or another number of alternatives, changes the allocation and the cells that read it, and
neither sensitivities nor errors.
"""

from __future__ import annotations

from typing import Any

from ..config import allocations, entries, registry
from ..config.cells import Cell
from ..schemes.granularities import searched
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
        method, calibration, spec = self._solved(cell)
        spec["rank"] = allocations.allocation_of(self.config, cell)["rank"]
        reads = {
            "model": (self.fetch_model(cell.model), "folder"),
            "transform": (self.fit_transform(cell), "transform"),
            "statistics": (self.calibrate_model(cell.model, calibration), "statistics"),
            "allocation": (self.allocate_bits(cell), "allocation"),
        }
        return self._step("quantize_model", spec, reads, {"mitigation": method.module}, **cell.axes)  # type: ignore[arg-type]

    @once
    def measure_schemes(self, cell: Cell) -> Step:
        """Plan the errors of all linears under the candidates of an allocated cell.

        A mitigation that reads statistics solves with those of one half of the windows, and its errors are
        measured on the other half.
        """
        method, calibration, spec = self._solved(cell)
        reads = {
            "model": (self.fetch_model(cell.model), "folder"),
            "transform": (self.fit_transform(cell), "transform"),
            "statistics": (self.calibrate_model(cell.model, calibration), "statistics"),
        }
        if method.reads_statistics:
            reads["statistics"] = (self.calibrate_model(cell.model, calibration, SOLVED), "statistics")
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
        calibration = entries.entry(self.config, "mitigations", cell.mitigation).get("calibration", "default")
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

    def _solved(self, cell: Cell) -> tuple[registry.Method, str, dict[str, Any]]:
        """Method and calibration of the mitigation of a cell, and the specification of a job that solves linears."""
        entry = entries.entry(self.config, "mitigations", cell.mitigation)
        calibration = entry.pop("calibration", "default")
        method = registry.method("mitigations", entry["method"])
        resolved, where = method.resolve(entry, f"mitigations.{cell.mitigation}"), f"mitigations.{cell.mitigation}"
        schemes = searched(
            entries.resolved_schemes(self.config, cell), resolved["options"], f"{where} on format '{cell.format}'"
        )
        return method, calibration, {"mitigation": registry.split_propagation(resolved)[0], "schemes": schemes}
