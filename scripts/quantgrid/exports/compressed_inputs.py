"""Capability rules of rounded inputs in compressed-tensors folders: what loaders compute at run time.
Standard library only."""

from __future__ import annotations

from ..schemes.quant_scheme import QuantScheme
from .capabilities import DTYPE_OF_SCALE, Findings
from .compressed_formats import MX

# nats per token, with a margin over what was measured: at most 7.9e-2, 2.5e-3, 5.1e-2, 1.2e-2
TIE_KL, INT8_KL, NVFP4_KL, MXFP8_KL = 2e-1, 1e-2, 1e-1, 3e-2
# nats per token of inputs rounded in the dtype of the folder, by bits: at most 0.29 and 1.6e-2 measured, on
# a tiny Llama with outliers of activations
SERVED_KL, SERVED_8_BIT_KL = 0.5, 5e-2
SERVED_MX = {"e2m1": "mxfp4_served", "e2m3": "mxfp6_served", "e4m3": "mxfp8_served"}
QUOTIENT_KL = 1e-5  # of quotients in bfloat16 that fall on a tie: one logit of a million moved in its last bit


def judge_input(found: Findings, where: str, scheme: QuantScheme) -> None:
    """Judge inputs in ``scheme``, named ``where`` in messages."""
    kind = scheme.element_format.kind
    static = scheme.granularity == "tensor"
    if not static and (scheme.range != "minmax" or scheme.clip_ratio != 1):
        found.refuse(
            f"{where} have range {scheme.range} and clip_ratio {scheme.clip_ratio:g}, and loaders take the extremes",
            "activation: {range: minmax, clip_ratio: 1}, or weights alone (activation: null)",
        )
    if kind == "integer" and scheme.global_scale == "none":
        _judge_integer_input(found, where, scheme)
    elif scheme.scale_format == "e8m0" and scheme.element in MX and scheme.group_size == 32:
        _judge_microscaling_input(found, where, scheme)
    elif scheme.element == "e2m1" and scheme.scale_format == "e4m3" and scheme.group_size == 16:
        _judge_two_level_input(found, where, scheme)
    elif scheme.element == "e4m3" and scheme.granularity != "group" and scheme.scale_format in DTYPE_OF_SCALE:
        _judge_scale_format(found, where, scheme)
    else:
        found.refuse(
            f"{where}: no loader rounds them to {scheme.element} with {scheme.scale_format} scales",
            "w8a8_served, w4a4_served, mxfp4_served or nvfp4_served, or weights alone (activation: null)",
        )


def _judge_integer_input(found: Findings, where: str, scheme: QuantScheme) -> None:
    bits = scheme.element_format.bits
    _judge_scale_format(found, where, scheme)
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


def _judge_scale_format(found: Findings, where: str, scheme: QuantScheme) -> None:
    if scheme.scale_format == "fp32" or scheme.granularity == "tensor":
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
    found.refuse(reason, f"activation: {{scale_rule: {rule}}}, as in {SERVED_MX[scheme.element]}")


def _judge_two_level_input(found: Findings, where: str, scheme: QuantScheme) -> None:
    if scheme.global_scale != "static":
        found.refuse(
            f"{where} have a global scale per {scheme.global_scale}, and loaders one from the folder",
            "nvfp4_served (activation: {global_scale: static})",
        )
        return
    found.bound(f"{where}: transformers computes quotients of scales in bfloat16 (1 % of the elements)", NVFP4_KL)
