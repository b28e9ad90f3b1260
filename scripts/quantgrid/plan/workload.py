"""Workload class and token counts of a job, from the config alone; input of the memory and disk
estimates. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import entries, registry
from ..machine.chunks import windows_per_batch
from .shards import shards

WINDOWS = 256  # assumed of a corpus that takes all of its windows
GATED = 2 * 128  # tokens of a gate (scripts/gate_model.py)


def size(config: Mapping[str, Any], rule: str) -> dict[str, int]:
    """Count ``tokens`` in the largest corpus, as far as a job of ``rule`` reads it, and in a
    ``batch`` of its windows."""
    if rule in ("gate_model", "gate_transform"):
        return {"tokens": GATED, "batch": GATED}
    corpora = config["corpora"].values()
    return {
        "tokens": max(_windows_read(config, rule, entry) * entry["window"] for entry in corpora),
        "batch": windows_per_batch(config["evaluation"]["batch_size"]) * max(entry["window"] for entry in corpora),
    }


def _windows_read(config: Mapping[str, Any], rule: str, entry: Mapping[str, Any]) -> int:
    """Count the windows of a corpus that a job of ``rule`` holds, its largest shard where it has
    shards."""
    how, windows = config["evaluation"], entry.get("windows", WINDOWS)
    if rule in ("evaluate_reference", "evaluate_perplexity", "screen_cell"):
        found = shards(entry.get("windows"), how["shard_windows"], windows_per_batch(how["batch_size"]))
        return max(shard.size or WINDOWS for shard in found)
    return min(windows, how["residual_error_windows"]) if rule == "measure_residual_error" else windows


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
