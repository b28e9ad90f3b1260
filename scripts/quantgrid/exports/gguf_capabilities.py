"""Cells that a GGUF file holds for llama.cpp, and GGML types of weight schemes. Standard library
only.

llama.cpp rounds the inputs of quantized linears to 8 bits per block of 32: that is the ``KL`` that
the check of an export accepts. A file holds no online operations and no rounding of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..models.plans import LINEARS
from ..schemes.quant_scheme import QuantScheme
from .features import Features
from .verdicts import Verdict

TARGET = "gguf"
KL = 5e-4  # nats per token between llama.cpp and the cell; right files measure 1e-4
UNROUNDED = "BF16"


@dataclass(frozen=True)
class Block:
    """GGML type: elements of a block, bits of an element, elements per scale, and what is added to
    a signed code."""

    name: str
    size: int
    bits: int
    group: int
    offset: int = 0


BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        Block("Q4_0", 32, 4, 32, 8),
        Block("Q4_1", 32, 4, 32),
        Block("Q5_0", 32, 5, 32, 16),
        Block("Q5_1", 32, 5, 32),
        Block("Q8_0", 32, 8, 32),
        Block("MXFP4", 32, 4, 32),
        Block("NVFP4", 64, 4, 16),
    )
}
_INTEGERS = {
    True: {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"},
    False: {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"},
}
# architecture of transformers -> of llama.cpp, and the kinds of linears whose bias it reads
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "LlamaForCausalLM": ("llama", LINEARS),
    "MistralForCausalLM": ("llama", LINEARS),
    "Qwen2ForCausalLM": ("qwen2", ("q", "k", "v", "o")),
    "Qwen3ForCausalLM": ("qwen3", ("q", "k", "v", "o")),
}


def block_of(scheme: QuantScheme) -> Block | str:
    """GGML type that holds weights of ``scheme``, or the reason why none does."""
    element = scheme.element_format
    if element.kind == "integer":
        name = _INTEGERS[scheme.symmetric].get(element.bits)
        if name is None:
            return f"no GGML type holds asymmetric {scheme.element} weights; symmetric: true is accepted"
        if scheme.global_scale == "token":
            return "a global scale per row has no place in the file; global_scale: tensor is accepted"
    elif scheme.element == "e2m1" and scheme.scale_format == "e8m0" and scheme.scale_multiplier == 1:
        name = "MXFP4"
    elif scheme.element == "e2m1" and scheme.scale_format == "e4m3" and scheme.global_scale not in ("none", "token"):
        name = "NVFP4"
    else:
        return (
            f"no GGML type holds {scheme.element} weights with {scheme.scale_format} scales"
            f"{_rule(scheme)}; int2 to int8, mxfp4 and nvfp4 are accepted"
        )
    block = BLOCKS[name]
    if scheme.granularity == "group" and scheme.group_size % block.group:  # type: ignore[operator]
        return (
            f"groups of {scheme.group_size}: {name} has a scale per {block.group} elements; "
            f"multiples of {block.group} are accepted"
        )
    return block


def _rule(scheme: QuantScheme) -> str:
    if scheme.scale_multiplier != 1:
        return f" of rule {scheme.scale_rule}"
    return f" and global_scale {scheme.global_scale}" if scheme.storage.global_scale == "needed" else ""


def gguf_verdict(features: Features) -> Verdict:
    """Verdict on a cell: exact weights, weights within a bound, or refused with every reason."""
    refusals = tuple(_refusals(features))
    if refusals:
        return Verdict(TARGET, refusals)
    return Verdict(
        TARGET,
        bounds=tuple(_bounds(features.schemes.weight)),
        losses=tuple(_losses(features)),
        loaders=("llama.cpp",),
        kl=KL,
    )


def _refusals(features: Features) -> Iterator[str]:
    architecture, schemes = features.shape.architecture, features.schemes
    if architecture not in ARCHITECTURES:
        yield f"{architecture} has no GGUF mapping here; {', '.join(ARCHITECTURES)} are accepted"
    elif unread := [kind for kind in features.biased if kind not in ARCHITECTURES[architecture][1]]:
        name = ARCHITECTURES[architecture][0]
        yield f"a shift gives biases to {', '.join(unread)}, which '{name}' of llama.cpp does not read; no shift there"
    if schemes.activation:
        elements = sorted({scheme.element for found in schemes.activation.values() for scheme in found})
        yield (
            f"rounded activations ({', '.join(elements)}): llama.cpp rounds them by its own rule; "
            "the weight-only recipe is accepted (activation: null)"
        )
    if features.online:
        named = ", ".join(f"{' and '.join(names)} at {site}" for site, names in features.online.items())
        yield f"online operations ({named}) have no place in the file; the recipe without them is accepted"
    if features.branch_inputs:
        yield "low-rank terms have no place in the file; the mitigation without them is accepted"
    if features.outliers:
        yield "outliers kept apart have no place in the file; the mitigation without them is accepted"
    if schemes.weight is not None:
        yield from _scheme_refusals(features, schemes.weight)


def _scheme_refusals(features: Features, scheme: QuantScheme) -> Iterator[str]:
    block = block_of(scheme)
    if isinstance(block, str):
        yield block
        return
    plans = [plan for plan, _ in features.shape.plans()]
    sizes = {
        linear: features.shape.linear_size(linear)[1]
        for plan in plans
        for linear in plan.linears_of(features.schemes.linears)
    }
    if odd := {linear: size for linear, size in sizes.items() if size % block.size}:
        named = ", ".join(f"{linear} has {size}" for linear, size in odd.items())
        yield f"{block.name} accepts inputs in multiples of {block.size}; {named}; leave them out of `linears`"


def _bounds(scheme: QuantScheme | None) -> Iterator[str]:
    """Reasons why weights differ in the file, with the largest difference."""
    if scheme is None or scheme.element_format.kind != "integer":
        return
    if scheme.scale_format in ("bf16", "e8m0"):
        yield f"{scheme.scale_format} scales are exact in float16 from 2^-17 to 65504, and within 2^-25 below"
    if scheme.scale_format not in ("bf16", "e8m0", "fp16") or scheme.global_scale != "none":
        yield "steps are rounded to float16: 2^-11 relative (2^-25 absolute below 2^-14)"
    elif scheme.scale_multiplier != 1:
        yield f"steps of rule {scheme.scale_rule} are rounded to float16: 2^-11 relative"
    if not scheme.symmetric:
        steps = 2**scheme.element_format.bits - 1
        yield f"the minimum -zero point x step is rounded to float16: at most {steps * 2**-11:.1%} of a step"


def _losses(features: Features) -> Iterator[str]:
    scheme = features.schemes.weight
    if features.schemes.key_value is not None:
        yield "the cache of keys and values is not rounded: llama.cpp has its own cache types"
    if scheme is not None:
        block = block_of(scheme)
        if not isinstance(block, str) and block.bits > scheme.element_format.bits:
            yield f"{scheme.element} codes take {block.bits} bits each as {block.name}"
