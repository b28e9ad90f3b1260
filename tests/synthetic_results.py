"""Results that nothing computed, for tests of tables and figures: evaluations of the form that jobs
write.

Losses follow a simple rule of the axes, with windows in common, so that pairing, intervals and
verdicts have something to work on.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from quantgrid.config.cells import Cell, baseline
from quantgrid.config.grid import asked
from quantgrid.plan.pipeline import Plan

WINDOWS = 32


def losses(cell: Cell) -> np.ndarray:
    """Negative log-likelihood of every window, nats per token; lower with a rotation, GPTQ, finer
    groups and more bits."""
    shared, own = np.random.default_rng(0), np.random.default_rng(zlib.crc32(cell.path.encode()))
    above = 0.0
    if cell.quantized:
        group = int(cell.granularity.rpartition("-")[2]) if cell.granularity.startswith("group") else 576
        above = (
            1.5 * (0.4 + group / 576) * (0.3 if "rotation" in cell.transform or "hadamard" in cell.transform else 1.0)
        )
        above *= {"rtn": 1.0, "low-rank": 0.93}.get(cell.mitigation, 0.6) * (3.0 if "e2m1-e2m1" in cell.format else 1.0)
    return shared.normal(2.7, 0.3, WINDOWS) + above * own.normal(1, 0.05, WINDOWS)


def content(plan: Plan, cell: Cell, name: str, path: str) -> dict[str, Any]:
    """One evaluation of one cell."""
    kind, _, dataset = name.partition(".")
    about = {
        "axes": {**cell.axes, "key": Path(path).stem, **({"corpus": dataset} if dataset else {})},
        "status": "ok",
        "model": {"weights_sha256": {"model.safetensors": "0" * 64}},
    }
    values = losses(cell)
    if kind == "perplexity":
        protocol = {
            "name": "token perplexity, windows of 256",
            "corpus": dataset,
            "text_sha256": "ab" * 32,
            "window": 256,
            "stride": 256,
            "bos": False,
            "normalization": "token",
            "dtype": "float32",
            "join": "\n\n",
            "windows": WINDOWS,
            "tokens": 256 * WINDOWS,
        }
        divergence = np.maximum(values - losses(baseline(cell.model)), 0) + 1e-4
        return {
            **about,
            "corpus": {"corpus": dataset, "text_sha256": "ab" * 32},
            "protocol": protocol,
            "windows": {"negative_log_likelihood": values.tolist(), "kl_divergence": divergence.tolist()},
        }
    if kind == "error":
        linears = {f"0.{linear}": {"bits": bits(cell)} for linear in "qkvo"}
        summary = {
            "bits": bits(cell),
            "stored_bits": bits(cell) + 0.01,
            "online_operations": 1000 * len(cell.transform),
            "added_parameters": 0,
            "untied_parameters": 0,
            "weight_sqnr_db": 20.0,
            "output_sqnr_db": 18.0,
            "joint_output_sqnr_db": 15.0,
        }
        return {**about, "summary": summary, "linears": linears, "details": {}}
    if kind == "residual_error":
        growth = [{"error": 0.02 * layer, "added": 0.05, "passed_on": 0.017 * layer} for layer in range(1, 31)]
        return {
            **about,
            "layers": [{part: value * (1 + values.mean() - 2.7) for part, value in layer.items()} for layer in growth],
            "windows": 4,
        }
    found = {}
    wanted = [
        asked(plan.config, plan.config["studies"][study])["tasks"]
        for study, cells in plan.studies.items()
        if cell in cells
    ]
    for task in next(filter(None, wanted)):
        outcomes = (np.random.default_rng(len(task)).random(100) < 0.9 - values.mean() / 8).astype(float).tolist()
        found[task] = {
            "value": float(np.mean(outcomes)),
            "stderr": 0.05,
            "count": 100,
            "outcomes": outcomes,
            "documents_sha256": "cd" * 32,
            "protocol": {"name": task, "task": task, "metric": "acc", "shots": 0, "batch_size": 4},
        }
    return {**about, "tasks": found}


def bits(cell: Cell) -> float:
    if not cell.quantized:
        return 16.0
    group = int(cell.granularity.rpartition("-")[2]) if cell.granularity.startswith("group") else 576
    return 4 + 32 / group + (0.4 if "low" in cell.mitigation else 0.0)
