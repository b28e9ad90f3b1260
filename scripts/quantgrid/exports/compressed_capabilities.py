"""Capability rules of compressed-tensors folders: formats of weights, activations as the loaders round
them, loaders. Standard library only.

Facts are of compressed-tensors 0.20, transformers 5.23 and vLLM 0.32. transformers' values were
compared element by element; vLLM's rules are read from its source.
"""

from __future__ import annotations

from ..models.plans import LINEARS
from ..schemes.quant_scheme import QuantScheme
from .capabilities import (
    DTYPE_OF_SCALE,
    SCALE_KL,
    TRANSFORMERS,
    VLLM,
    Findings,
    activation_schemes,
    fits,
    is_partial,
    judge_biases,
    judge_float16,
    judge_side_terms,
)
from .features import Features
from .verdicts import Verdict

TARGET = "compressed-tensors"
ONLINE_ROTATION = "online_rotation"  # the flag that accepts rotations which loaders have to run
ROTATIONS = ("hadamard", "block_hadamard")  # online operations that a matrix in the folder describes
PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, MXFP6, MXFP8 = "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"
NVFP4 = "nvfp4-pack-quantized"
# element -> (format, rule by which loaders round scales of activations)
MX = {"e2m1": (MXFP4, "even"), "e2m3": (MXFP6, "even"), "e4m3": (MXFP8, "rceil")}
BLOCK_FORMATS = (MXFP4, MXFP6, MXFP8, NVFP4)
# nats per token, with a margin over what was measured on models of 1 to 12 million parameters
TIE_KL, INT8_KL, NVFP4_KL, MXFP8_KL = 5e-2, 2e-3, 5e-2, 1e-2
QUOTIENT_KL = 1e-5  # of quotients in bfloat16 that fall on a tie: one logit of a million moved in its last bit


def weight_format(weight: QuantScheme, activation: QuantScheme | None) -> str | None:
    """Name of the format that holds weights in ``weight`` with inputs in ``activation``; None if
    there is none."""
    element, blocks = weight.element_format, (weight.scale_format, weight.group_size, weight.global_scale)
    if weight.scale_rule == "four_thirds":
        return None
    if element.kind == "integer":
        unpacked = activation is not None and (element.bits == 8 or not weight.symmetric)
        return INTEGER if unpacked else PACKED
    if weight.element in MX and blocks == ("e8m0", 32, "none"):
        return MX[weight.element][0]
    if weight.element == "e2m1" and blocks == ("e4m3", 16, "tensor"):
        return NVFP4
    if weight.element == "e4m3" and weight.granularity != "group" and weight.scale_format in DTYPE_OF_SCALE:
        return FLOAT if weight.global_scale == "none" else None
    return None


def judge(features: Features, dtype: str, flags: frozenset[str]) -> Verdict:
    """Verdict on a cell as a folder with ``dtype`` in its config."""
    found = Findings(TARGET, loaders=[TRANSFORMERS, VLLM])
    judge_side_terms(found, features)
    judge_biases(found, features)
    _judge_online(found, features, flags)
    if features.schemes.weight is None:
        _refuse_full_precision(found, features)
        return found.verdict()
    inputs = activation_schemes(features)
    _judge_weight(found, features, [*inputs], dtype)
    for scheme, where in inputs.items():
        _judge_activation(found, where, scheme, dtype)
    _judge_low_rank(found, features)
    _judge_linears(found, features, dtype)
    judge_float16(found, dtype)
    if not found.refusals:
        _judge_vllm(found, features, [*inputs])
    return found.verdict()


def _refuse_full_precision(found: Findings, features: Features) -> None:
    if any(features.schemes.activation.values()):
        found.refuse("no scheme rounds activations alone", "w8a8_served or w4a4_served, which round weights too")
    else:
        found.refuse("the cell rounds no weights", "TO=dense")


def _judge_weight(found: Findings, features: Features, inputs: list[QuantScheme], dtype: str) -> None:
    weight = features.schemes.weight
    assert weight is not None
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
        if dtype != "bfloat16":
            found.refuse(f"{name} weights are dequantized to bfloat16, and a {dtype} model fails", "dtype bfloat16")
    else:
        found.check_dtype = "float32" if inputs else dtype
        if not fits(weight, dtype):
            by = "" if name == PACKED else " by transformers in that dtype (not by vLLM)"
            found.bound(f"{_scales(weight)} of weights are rounded to {dtype}{by}", SCALE_KL)
    if name == NVFP4:
        _judge_shared_scales(found, features)


def _scales(scheme: QuantScheme) -> str:
    return f"{scheme.scale_format} scales" if scheme.global_scale == "none" else "products of scale and global scale"


def _nearest_weight(weight: QuantScheme) -> str:
    four = "w4a16_g64, mxfp4_served or nvfp4_served"
    return {2: "w2 or w3 integers in groups", 4: four, 6: "mxfp6", 8: "fp8 or mxfp8"}.get(
        weight.element_format.bits, four
    )


def _judge_shared_scales(found: Findings, features: Features) -> None:
    if features.shares_global_scale:
        return
    if features.shape.family.joined:
        found.refuse(
            f"one linear of {features.shape.architecture} holds several of the cell, with a global scale each",
            "the mitigation with global_scale: site",
        )
    found.exclude(
        VLLM,
        "takes one global scale for q, k, v and one for gate, up, and those of the cell differ "
        "(export a cell whose mitigation has global_scale: site)",
    )


def _judge_activation(found: Findings, where: str, scheme: QuantScheme, dtype: str) -> None:
    kind = scheme.element_format.kind
    static = scheme.granularity == "tensor"
    if not static and (scheme.range != "minmax" or scheme.clip_ratio != 1):
        found.refuse(
            f"{where} have range {scheme.range} and clip_ratio {scheme.clip_ratio:g}, and loaders take the extremes",
            "activation: {range: minmax, clip_ratio: 1}, or weights alone (activation: null)",
        )
    if kind == "integer" and scheme.global_scale == "none":
        _judge_integer_input(found, where, scheme, dtype)
    elif scheme.scale_format == "e8m0" and scheme.element in MX and scheme.group_size == 32:
        _judge_microscaling_input(found, where, scheme)
    elif scheme.element == "e2m1" and scheme.scale_format == "e4m3" and scheme.group_size == 16:
        _judge_two_level_input(found, where, scheme)
    elif scheme.element == "e4m3" and scheme.granularity != "group" and scheme.scale_format in DTYPE_OF_SCALE:
        _judge_scale_format(found, where, scheme, dtype)
    else:
        found.refuse(
            f"{where}: no loader rounds them to {scheme.element} with {scheme.scale_format} scales",
            "w8a8_served, w4a4_served, mxfp4_served or nvfp4_served, or weights alone (activation: null)",
        )


def _judge_integer_input(found: Findings, where: str, scheme: QuantScheme, dtype: str) -> None:
    bits = scheme.element_format.bits
    _judge_scale_format(found, where, scheme, dtype)
    if scheme.granularity == "tensor":
        return
    half = 2 ** (bits - 1) - 0.5
    if not scheme.symmetric:
        found.bound(
            f"zero points of {scheme.element} {where}: loaders round halves after the zero point is added",
            INT8_KL if bits == 8 else TIE_KL,
        )
    elif scheme.qmax != half and bits == 8:
        found.bound(f"{where}: loaders map the maximum to {half}, the cell to {scheme.limit:g}", INT8_KL)
    elif scheme.qmax != half:
        found.refuse(
            f"{where}: loaders map the maximum to {half}, the cell to {scheme.limit:g}",
            f"activation: {{qmax: {half}}}, as in w4a4_served",
        )


def _judge_scale_format(found: Findings, where: str, scheme: QuantScheme, dtype: str) -> None:
    if scheme.scale_format == "fp32":
        if dtype != "float32":
            found.notes.append(
                f"transformers computes scales of activations in the dtype of the model: run it in float32 for the "
                f"cell's results; in {dtype} they differ by its rounding"
            )
    elif scheme.granularity == "tensor":
        return
    elif scheme.scale_format in DTYPE_OF_SCALE:
        found.bound(f"{where}: loaders do not round scales to {scheme.scale_format}", TIE_KL)
    else:
        found.refuse(
            f"{where}: no loader has {scheme.scale_format} scales for {scheme.element}",
            "activation: {scale_format: fp32}, or weights alone (activation: null)",
        )


def _judge_microscaling_input(found: Findings, where: str, scheme: QuantScheme) -> None:
    rule = MX[scheme.element][1]
    found.kl = max(found.kl, QUOTIENT_KL)
    if scheme.scale_rule == rule:
        return
    reason = f"{where}: loaders round {scheme.element} scales by the rule {rule}, the cell by {scheme.scale_rule}"
    if scheme.element == "e4m3" and scheme.scale_rule != "four_thirds":
        found.bound(reason, MXFP8_KL)
        return
    served = ", as in mxfp4_served" if scheme.element == "e2m1" else ""
    found.refuse(reason, f"activation: {{scale_rule: {rule}}}{served}")


def _judge_two_level_input(found: Findings, where: str, scheme: QuantScheme) -> None:
    if scheme.global_scale != "static":
        found.refuse(
            f"{where} have a global scale per {scheme.global_scale}, and loaders one from the folder",
            "nvfp4_served (activation: {global_scale: static})",
        )
        return
    found.bound(f"{where}: transformers computes quotients of scales in bfloat16 (1 % of the elements)", NVFP4_KL)


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
    weight = features.schemes.weight
    if weight is not None and weight_format(weight, None) not in BLOCK_FORMATS:
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
    if any(is_partial(linears, parts) for parts in (("q", "k", "v"), ("gate", "up"))):
        found.exclude(VLLM, "needs q, k, v in one scheme, and gate, up")
    if len(linears) < len(LINEARS):
        if found.check_dtype != dtype:
            found.bound(f"weights of linears in full precision are rounded to {dtype}", SCALE_KL)
        found.notes.append(f"rounded linears: {', '.join(linears)}; all others are in full precision")


def _judge_vllm(found: Findings, features: Features, inputs: list[QuantScheme]) -> None:
    weight, activation = features.schemes.weight, inputs[0] if inputs else None
    assert weight is not None
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
