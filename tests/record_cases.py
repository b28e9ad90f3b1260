"""Evaluations of three cells as JSON, for the tests of records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from quantgrid.config.cells import Cell, baseline
from quantgrid.evaluation.protocols import of_perplexity, of_task
from quantgrid.reporting.data import collection

FULL = baseline("m")
RTN, GPTQ = (Cell("m", "none", mitigation, "channel", "int4") for mitigation in ("rtn", "gptq"))
DRAWN = np.random.default_rng(0)
LOSSES = {FULL: DRAWN.normal(3.0, 0.3, 12)}
LOSSES |= {RTN: LOSSES[FULL] + DRAWN.normal(0.4, 0.05, 12), GPTQ: LOSSES[FULL] + DRAWN.normal(0.1, 0.02, 12)}
DIVERGENCES = {FULL: np.zeros(12), RTN: DRAWN.gamma(2.0, 0.2, 12), GPTQ: DRAWN.gamma(2.0, 0.05, 12)}
OUTCOMES = {FULL: [1, 1, 1, 0, 1, 0, 1, 1], RTN: [0, 1, 0, 0, 1, 0, 0, 1], GPTQ: [1, 1, 0, 0, 1, 0, 1, 1]}


def mean_error(values: np.ndarray) -> float:
    return np.std(values, ddof=1) / math.sqrt(len(values))


def perplexity(cell: Cell, **protocol: Any) -> dict[str, Any]:
    """The JSON of merge_shards."""
    windows = {"negative_log_likelihood": LOSSES[cell].tolist(), "kl_divergence": DIVERGENCES[cell].tolist()}
    corpus = {
        "corpus": "docs",
        "text_sha256": "ab",
        "join": "\n\n",
        "window": 64,
        "stride": 64,
        "windows": 12,
        "selection": "sequential",
        "tokens": 800,
        "tokenizer_sha256": "ef",
        "seed": 3,
        "axes": {"key": cell.path},
        "versions": {"python": "3"},
        **protocol,
    }
    return {
        "status": "ok",
        "axes": cell.axes,
        "perplexity": 0.0,
        "stderr": 0.0,
        "windows": windows,
        "corpus": corpus,
        "model": {"weights_sha256": {"model.safetensors": f"weights of {cell.model}"}},
        "protocol": of_perplexity(corpus, protocol.get("dtype", "float32")),
    }


def tasks(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The JSON of evaluate_tasks, of one task."""
    outcomes = OUTCOMES[cell]
    result = {
        "metric": "acc",
        "value": float(np.mean(outcomes)),
        "stderr": float(mean_error(np.array(outcomes))),
        "count": 8,
        "outcomes": outcomes,
        "version": "1",
        "shots": 0,
        "documents_sha256": "cd",
        "lm_eval": "0.4",
        "task": "cloze",
        "source": "builtin",
        **changes,
    }
    return {
        "status": "ok",
        "axes": cell.axes,
        "tasks": {"cloze": {**result, "protocol": of_task(result, 4, None, "float32")}},
    }


def error(cell: Cell) -> dict[str, Any]:
    """The JSON of the errors of quantize_model; full precision has its bits only."""
    quantized, full = (
        {"bits": 4.5, "stored_bits": 4.25, "weight_sqnr_db": 18.5, "output_sqnr_db": 21.0},
        {"bits": 16.0, "stored_bits": 16.0},
    )
    summary = quantized if cell.quantized else full
    return {"status": "ok", "summary": summary, "linears": {"0.q": {}, "0.k": {}, "0.v": {}}}


def failed(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason}


def evaluations(*cells: Cell) -> dict[Cell, dict[str, dict[str, Any]]]:
    """cell -> evaluation -> its JSON, as a study with one corpus and one task has them."""
    return {cell: {"error": error(cell), "perplexity.docs": perplexity(cell), "tasks": tasks(cell)} for cell in cells}


def row(frame: pd.DataFrame, cell: Cell, metric: str) -> pd.Series:
    found = frame[(frame.cell == collection.cell_key(cell)) & (frame.metric == metric)]
    assert len(found) == 1
    return found.iloc[0]


def saved(tmp_path: Path, *studies: dict[Cell, dict[str, dict[str, Any]]]) -> list[pd.DataFrame]:
    """The records of several studies as collect_results reads them."""
    for number, found in enumerate(studies):
        collection.write(collection.records(found), tmp_path / f"{number}.csv")
    return [collection.read(tmp_path / f"{number}.csv") for number in range(len(studies))]
