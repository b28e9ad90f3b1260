"""Capability rules of a dense folder: dequantized weights. Standard library only."""

from __future__ import annotations

from .capabilities import (
    SCALE_KL,
    TRANSFORMERS,
    VLLM,
    Findings,
    judge_biases,
    judge_float16,
    judge_order,
    lose_key_values,
    refuse_activations,
    refuse_online,
)
from .features import Features
from .verdicts import Verdict

TARGET = "dense"


def judge(features: Features, dtype: str, flags: frozenset[str]) -> Verdict:
    """Verdict on a cell as a folder of dequantized weights in ``dtype``."""
    found = Findings(TARGET, loaders=[TRANSFORMERS, VLLM], check_dtype=dtype)
    if features.clips:
        found.refuse("learned limits of activations are dropped", "the same transform without learned limits")
    lose_key_values(found, features)
    judge_biases(found, features)
    refuse_online(found, features)
    refuse_activations(found, features)
    judge_float16(found, dtype)
    judge_order(found, features)
    weights = features.schemes.weights
    if weights:
        found.notes.append(f"weights have the size of {dtype}: the folder is as large as an unquantized model")
        exact = all(weight.scale_format == "e8m0" and weight.scale_rule != "four_thirds" for weight in weights)
        if not exact and dtype != "float32":
            found.bound(f"dequantized weights are rounded to {dtype}", SCALE_KL)
    if features.shape.family.gain_offset and dtype != "float32":
        found.bound(f"gains of norms, 1 + w, are rounded by the cell in {dtype} and not by loaders", SCALE_KL)
    if features.branch_inputs:
        found.bound(f"low-rank terms are added to the weights in {dtype}", SCALE_KL)
    return found.verdict()
