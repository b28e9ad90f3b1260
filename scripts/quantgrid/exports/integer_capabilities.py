"""Capability rules of GPTQ and AWQ folders: integer weights with float16 scales. Standard library
only."""

from __future__ import annotations

from ..models.plans import LINEARS
from .capabilities import (
    SCALE_KL,
    VLLM,
    Findings,
    fits,
    judge_biases,
    judge_float16,
    judge_joined,
    judge_side_terms,
    refuse_activations,
    refuse_online,
    refuse_several_schemes,
)
from .features import Features
from .verdicts import Verdict

GPTQ, AWQ = "gptq", "awq"
BITS = {GPTQ: (2, 4, 8), AWQ: (4,)}
# sizes of groups that a kernel takes, beside one scale per row: of gptqmodel 7.7 in torch, of vLLM 0.32
GROUPS = {GPTQ: (16, 32, 64, 128, 256, 512, 1024), AWQ: (16, 32, 64, 128)}
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)
ARITHMETIC_KL = 1e-3  # nats per token, of float16 arithmetic: 1e-6 measured on reference-4m


def judge_gptq(features: Features, dtype: str, flags: frozenset[str]) -> Verdict:
    """Verdict of GPTQ's file format on a cell."""
    return _judge(GPTQ, features, dtype)


def judge_awq(features: Features, dtype: str, flags: frozenset[str]) -> Verdict:
    """Verdict of AWQ's file format (gemm) on a cell."""
    return _judge(AWQ, features, dtype)


def _judge(target: str, features: Features, dtype: str) -> Verdict:
    found = Findings(target, loaders=["gptqmodel", VLLM], check_dtype="float16")
    judge_side_terms(found, features)
    refuse_several_schemes(found, features)
    judge_biases(found, features)
    judge_joined(found, features)
    refuse_online(found, features)
    refuse_activations(found, features)
    if features.branch_inputs:
        found.refuse("low-rank terms are dropped", "TO=compressed-tensors, which has them as an adapter")
    _judge_weight(found, target, features)
    if dtype != "float16":
        found.refuse(f"scales are float16, and so is the model: dtype {dtype} is not accepted", "dtype float16")
    judge_float16(found, dtype)
    if len(features.schemes.linears) < len(LINEARS):
        found.refuse(
            "loaders differ in how they name linears in full precision", "linears: all, or TO=compressed-tensors"
        )
    return found.verdict()


def _judge_weight(found: Findings, target: str, features: Features) -> None:
    if not features.schemes.weights:
        found.refuse("the cell rounds no weights", "TO=dense")
        return
    weight = features.schemes.weights[0]
    element, accepted = weight.element_format, BITS[target]
    if element.kind != "integer" or element.bits not in accepted:
        found.refuse(
            f"{weight.element} weights: the format holds integers of {' or '.join(map(str, accepted))} bits",
            "w4a16_g64",
        )
        return
    odd = [kind for kind in LINEARS if any(size * element.bits % 32 for size in features.shape.linear_size(kind))]
    if odd and not features.shape.experts:
        found.refuse(f"sizes of {', '.join(odd)} fill no whole 32-bit words", "TO=compressed-tensors")
    found.bound("weights and products are float16", ARITHMETIC_KL)
    if not fits(weight, "float16"):
        found.bound(f"{weight.scale_format} scales of weights are rounded to float16", SCALE_KL)
    if weight.group_size and weight.group_size not in GROUPS[target]:
        found.refuse(
            f"groups of {weight.group_size}: kernels of {target.upper()} files take groups of "
            f"{', '.join(map(str, GROUPS[target]))} and one scale per row",
            "w4a16_g64 or w4a16_g128, or TO=compressed-tensors",
        )
    if element.bits not in VLLM_BITS:
        found.exclude(VLLM, f"has kernels for {' and '.join(map(str, VLLM_BITS))} bits only")
    if weight.group_size and weight.group_size not in VLLM_GROUPS:
        found.exclude(VLLM, f"has kernels for groups of {', '.join(map(str, VLLM_GROUPS))} and one scale per row only")
    if target == GPTQ and not weight.symmetric:
        found.exclude(VLLM, "reads symmetric GPTQ files only")
        found.notes.append("a zero point of 0 needs checkpoint_format gptq_v2, which few loaders read")
