"""Capability rules of compressed-tensors folders: formats of weights, activations as the loaders round
them, loaders. Standard library only.

Facts are of compressed-tensors 0.20, transformers 5.23 and vLLM 0.32. transformers' values were
compared element by element; vLLM's rules are read from its source.
"""

from __future__ import annotations

from itertools import product

from ..models.plans import LINEARS, SITE_OF
from ..schemes.quant_scheme import QuantScheme
from .capabilities import (
    SCALE_KL,
    TRANSFORMERS,
    VLLM,
    Findings,
    activation_schemes,
    fits,
    is_partial,
    judge_biases,
    judge_float16,
    judge_joined,
    judge_order,
    judge_side_terms,
)
from .compressed_formats import BLOCK_FORMATS, INTEGER, MXFP4, MXFP6, NVFP4, PACKED, weight_format
from .compressed_inputs import SERVED_8_BIT_KL, SERVED_KL, TIE_KL, judge_input
from .features import Features
from .verdicts import Verdict

TARGET = "compressed-tensors"
ONLINE_ROTATION = "online_rotation"  # the flag that accepts rotations which loaders have to run
ROTATIONS = ("hadamard", "block_hadamard")  # online operations that a matrix in the folder describes


def judge(features: Features, dtype: str, flags: frozenset[str]) -> Verdict:
    """Verdict on a cell as a folder with ``dtype`` in its config."""
    found = Findings(TARGET, loaders=[TRANSFORMERS, VLLM])
    judge_side_terms(found, features)
    judge_biases(found, features)
    judge_joined(found, features)
    _judge_online(found, features, flags)
    weights = features.schemes.weights
    if not weights:
        _refuse_full_precision(found, features)
        return found.verdict()
    inputs = activation_schemes(features)
    for weight in weights:
        _judge_weight(found, features, weight, [*inputs], dtype)
    for scheme, where in inputs.items():
        judge_input(found, where, scheme)
    _judge_low_rank(found, features)
    _judge_linears(found, features, dtype)
    judge_float16(found, dtype)
    judge_order(found, features)
    _judge_served(found, features, dtype)
    pairs = [*inputs, *([None] if _has_unrounded_inputs(features) else [])]
    if not all(weight.symmetric for weight in weights) and None in pairs and inputs:
        found.refuse(
            "asymmetric weights load only dequantized where their input is not rounded, and that drops the rounding of "
            "the other inputs",
            "weight: {symmetric: true}",
        )
    for weight, activation in product(weights, pairs) if not found.refusals else ():
        _judge_vllm(found, weight, activation)
    return found.verdict()


def _has_unrounded_inputs(features: Features) -> bool:
    """Check whether a rounded linear reads an input in full precision."""
    schemes = features.schemes
    return any(not schemes.activation.get(SITE_OF[linear]) for linear in schemes.linears)


def _refuse_full_precision(found: Findings, features: Features) -> None:
    if any(features.schemes.activation.values()):
        found.refuse("no scheme rounds activations alone", "w8a8_served or w4a4_served, which round weights too")
    else:
        found.refuse("the cell rounds no weights", "TO=dense")


def _judge_weight(
    found: Findings, features: Features, weight: QuantScheme, inputs: list[QuantScheme], dtype: str
) -> None:
    name = weight_format(weight, inputs[0] if inputs else None)
    if name is None:
        found.refuse(
            f"no format holds {weight.element} weights with {weight.scale_format} scales"
            f"{f' in groups of {weight.group_size}' if weight.group_size else ''}"
            f"{f' under scale_rule {weight.scale_rule}' if weight.scale_rule == 'four_thirds' else ''}",
            _nearest_weight(weight),
        )
        return
    if name in BLOCK_FORMATS:
        found.check_dtype = "bfloat16"
        if features.shape.family.gain_offset:
            found.bound(
                "gains of norms, 1 + w, are rounded by the cell in bfloat16 and not by loaders",
                TIE_KL if inputs else SCALE_KL,
            )
        if dtype != "bfloat16":
            found.refuse(f"{name} weights are dequantized to bfloat16, and a {dtype} model fails", "dtype bfloat16")
    else:
        # in float32 where bfloat16 arithmetic of the cell rounds more than that of loaders
        found.check_dtype = "float32" if inputs or features.shape.family.gain_offset else dtype
        if not fits(weight, dtype):
            by = "" if name == PACKED else " by transformers in that dtype (not by vLLM)"
            found.bound(f"{_scales(weight)} of weights are rounded to {dtype}{by}", SCALE_KL)
    if name == NVFP4:
        _judge_shared_scales(found, features)


def _scales(scheme: QuantScheme) -> str:
    return f"{scheme.scale_format} scales" if scheme.global_scale == "none" else "products of scale and global scale"


def _nearest_weight(weight: QuantScheme) -> str:
    bits = weight.element_format.bits
    if bits in (2, 3):
        return f"int{bits} with activation: null (weights alone)"
    return {6: "mxfp6_served", 8: "mxfp8_served or w8a8_served"}.get(bits, "w4a16_g64, mxfp4_served or nvfp4_served")


def _judge_shared_scales(found: Findings, features: Features) -> None:
    if not features.shares_global_scale:
        found.exclude(
            VLLM,
            "takes one global scale for q, k, v and one for gate, up, and those of the cell differ "
            "(weight: {global_scale: site} of the format, as in nvfp4_served, has one)",
        )


def _judge_online(found: Findings, features: Features, flags: frozenset[str]) -> None:
    for site, operations in features.online.items():
        if not operations:
            continue
        names = ", ".join(operations)
        if len(operations) > 1 or operations[0] not in ROTATIONS:
            found.refuse(
                f"loaders have no operation for {names} at {site}",
                "the same recipe with what folds into weights (rotations R1 and R2, or the sites that fold)",
            )
        elif ONLINE_ROTATION not in flags:
            found.refuse(
                f"the online rotation at {site} is dropped by transformers without a warning",
                f"the same recipe with rotations: [R1, R2]; or ARGS=--{ONLINE_ROTATION.replace('_', '-')}, which "
                "stores the matrix for loaders that run it",
            )
        else:
            found.loaders[:] = [f"{TRANSFORMERS} with load.py"]
            found.bound(
                f"the rotation at {site} is a product with a stored matrix",
                TIE_KL if any(features.schemes.activation.values()) else SCALE_KL,
            )
            found.exclude(TRANSFORMERS, "drops the rotation without a warning: use load.py of the folder")
            found.exclude(
                VLLM,
                "runs the stored rotation on CUDA alone, without tensor parallelism, and was not checked; "
                "on a CPU it fails",
            )


def _judge_low_rank(found: Findings, features: Features) -> None:
    if not features.branch_inputs:
        return
    rounded = any(features.schemes.activation.values())
    if rounded and "quantized" in features.branch_inputs:
        found.refuse(
            "low-rank terms read the rounded input, and an adapter reads the unrounded one",
            "branch_input: unquantized",
        )
    if any(features.online.values()):
        found.refuse("low-rank terms read the rotated input, and an adapter the unrotated one", "rotations: [R1, R2]")
    if features.shape.family.joined:
        found.refuse(
            f"low-rank terms of the parts of one linear of {features.shape.architecture} make no adapter",
            "the same mitigation without low-rank terms",
        )
    if any(weight_format(weight, None) not in BLOCK_FORMATS for weight in features.schemes.weights):
        found.check_dtype = "float32"  # PEFT computes adapters in float32
    else:
        found.bound("PEFT computes low-rank terms in float32", SCALE_KL)
    found.notes.append("low-rank terms are in the folder adapter/, for PEFT")
    found.exclude(VLLM, "an open issue reports wrong outputs of adapters over packed weights")


def _judge_linears(found: Findings, features: Features, dtype: str) -> None:
    linears = features.schemes.linears
    for module, parts in features.shape.family.joined.items():
        if is_partial(linears, parts):
            found.refuse(
                f"{module} holds {', '.join(parts)}, of which the cell rounds some", f"linears: with all of {parts}"
            )
    if not features.schemes.tied:
        found.exclude(VLLM, "needs q, k, v in one scheme, and gate, up (groups: fused)")
        if features.shape.family.joined:
            found.refuse(
                f"one linear of {features.shape.architecture} holds several of the cell, in several schemes",
                "groups: fused",
            )
    if any(is_partial(linears, parts) for parts in (("q", "k", "v"), ("gate", "up"))):
        found.exclude(VLLM, "needs q, k, v in one scheme, and gate, up")
    if len(linears) < len(LINEARS):
        if found.check_dtype != dtype:
            found.bound(f"weights of linears in full precision are rounded to {dtype}", SCALE_KL)
        found.notes.append(f"rounded linears: {', '.join(linears)}; all others are in full precision")


def _judge_served(found: Findings, features: Features, dtype: str) -> None:
    """Bound what loaders round in the dtype of the folder, where the check has another."""
    if found.check_dtype == dtype:
        return
    start = f"{'' if found.bounds else f'exact in {found.check_dtype}, but '}"
    inputs = activation_schemes(features)
    if inputs:
        kl = SERVED_8_BIT_KL if all(scheme.element_format.bits == 8 for scheme in inputs) else SERVED_KL
        found.bound_served(f"{start}loaders compute scales and quotients of inputs in {dtype}", kl)
    elif features.shape.family.gain_offset:
        found.bound_served(f"{start}gains of norms, 1 + w, are rounded by the cell in {dtype}", SCALE_KL)
    else:
        found.bound_served(f"{start}PEFT computes low-rank terms in float32, the cell in {dtype}", SCALE_KL)


def _judge_vllm(found: Findings, weight: QuantScheme, activation: QuantScheme | None) -> None:
    name = weight_format(weight, activation)
    if name in (PACKED, INTEGER):
        _judge_integer_kernels(found, weight, activation)
    elif name == MXFP6:
        found.exclude(VLLM, "has no scheme for 6-bit floats")
    elif name == MXFP4 and activation is not None:
        found.exclude(f"{VLLM} below SM100", "does not round activations of MXFP4 there")
    elif name == NVFP4 and activation is not None and activation.scale_format != "e4m3":
        found.exclude(VLLM, "rounds inputs of NVFP4 weights to NVFP4 or not at all")


def _judge_integer_kernels(found: Findings, weight: QuantScheme, activation: QuantScheme | None) -> None:
    if activation is None:
        if not weight.symmetric:
            found.exclude(TRANSFORMERS, "loads asymmetric packed weights only dequantized")
            found.loaders.append(f"{TRANSFORMERS} with CompressedTensorsConfig(dequantize=True)")
    elif weight_format(weight, activation) == INTEGER:
        if not weight.symmetric or weight.element_format.bits < 8 or weight.granularity == "group":
            found.exclude(VLLM, "has unpacked integers of 8 bits, symmetric, per channel or tensor")
        elif activation.element != "int8" or activation.granularity == "group":
            found.exclude(VLLM, "rounds inputs of 8-bit weights to int8, per token or with one scale")
    else:
        symmetric = activation.symmetric and activation.element_format.kind == "integer"
        if not symmetric or activation.granularity == "tensor":
            found.exclude(VLLM, "rounds inputs of packed integers symmetrically, per token or group")
        found.notes.append("vLLM has a kernel for packed integers with rounded inputs on a GPU only (not checked)")
