"""Capability rules of a GGUF file for llama.cpp, and GGML types of weight schemes. Standard library
only."""

from __future__ import annotations

from dataclasses import dataclass

from ..ground.errors import ConfigError
from ..models.plans import LINEARS
from ..schemes.quant_scheme import QuantScheme
from .capabilities import (
    SCALE_KL,
    Findings,
    judge_side_terms,
    refuse_activations,
    refuse_online,
    refuse_several_schemes,
)
from .features import Features
from .verdicts import Verdict

TARGET, LLAMA_CPP = "gguf", "llama.cpp"
# measured on reference-1m and on a tiny Llama with outliers of activations
ROUNDED_INPUTS = (
    "llama.cpp rounds the inputs of quantized linears to 8 bits per block of 32 (1e-4 to 3e-3 nats per token)"
)


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
_NARROW = ("fp16", "bf16", "e8m0")  # scale formats whose numbers float16 holds, apart from tiny ones
# architecture of transformers -> of llama.cpp, and the kinds of linears whose bias it reads
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "LlamaForCausalLM": ("llama", LINEARS),
    "MistralForCausalLM": ("llama", LINEARS),
    "Qwen2ForCausalLM": ("qwen2", ("q", "k", "v")),
    "Qwen3ForCausalLM": ("qwen3", ("q", "k", "v")),
}


def block_of(scheme: QuantScheme) -> Block | str:
    """GGML type that holds weights of ``scheme``, or the reason why none does and, after a semicolon,
    the nearest scheme that one holds."""
    element = scheme.element_format
    if element.kind == "integer":
        name = _INTEGERS[scheme.symmetric].get(element.bits)
        if name is None:
            return f"no GGML type holds asymmetric {scheme.element} weights; symmetric: true"
        if scheme.global_scale == "token":
            return "a global scale per row has no place in the file; global_scale: tensor"
    elif scheme.element == "e2m1" and scheme.scale_format == "e8m0" and scheme.scale_multiplier == 1:
        name = "MXFP4"
    elif scheme.element == "e2m1" and scheme.scale_format == "e4m3" and scheme.global_scale not in ("none", "token"):
        name = "NVFP4"
    else:
        return (
            f"no GGML type holds {scheme.element} weights with {scheme.scale_format} scales"
            f"{_rule(scheme)}; int4, mxfp4 or nvfp4 with activation: null, or TO=dense"
        )
    block = BLOCKS[name]
    if scheme.granularity == "group" and scheme.group_size % block.group:  # type: ignore[operator]
        return (
            f"groups of {scheme.group_size}: {name} has a scale per {block.group} elements; multiples of {block.group}"
        )
    return block


def block_for(scheme: QuantScheme | None, where: str) -> Block | None:
    """GGML type that holds weights of ``scheme``; None in full precision. Raises
    :class:`ConfigError`, naming ``where``, if none does."""
    block = None if scheme is None else block_of(scheme)
    if isinstance(block, str):
        raise ConfigError(f"{where}: {block}")
    return block


def _rule(scheme: QuantScheme) -> str:
    if scheme.scale_multiplier != 1:
        return f" of rule {scheme.scale_rule}"
    return f" and global_scale {scheme.global_scale}" if scheme.storage.global_scale == "needed" else ""


def judge(features: Features, dtype: str, flags: frozenset[str]) -> Verdict:
    """Verdict on a cell as one file: quantized blocks, all other matrices in ``dtype`` (bfloat16)."""
    found, architecture = Findings(TARGET, loaders=[LLAMA_CPP]), features.shape.architecture
    judge_side_terms(found, features)
    refuse_several_schemes(found, features)
    refuse_activations(found, features)
    refuse_online(found, features)
    if features.branch_inputs:
        found.refuse("low-rank terms have no place in the file", "the same mitigation without them, or TO=dense")
    if architecture not in ARCHITECTURES:
        found.refuse(f"{architecture} has no mapping to GGUF here", f"a model of {', '.join(ARCHITECTURES)}")
    else:
        _judge_biases(found, features)
    for weight in features.schemes.weights[:1]:
        found.bound(ROUNDED_INPUTS, 0.0)  # of llama.cpp; the weights in the file have a bound that follows
        _judge_weight(found, features, weight)
    return found.verdict()


def _judge_biases(found: Findings, features: Features) -> None:
    """Refuse biases that llama.cpp does not read; the config plays no part in it."""
    name, read = ARCHITECTURES[features.shape.architecture]
    if unread := [kind for kind in features.biased if kind not in read]:
        found.refuse(
            f"a shift folds into a bias of {', '.join(unread)}, which '{name}' of llama.cpp does not read",
            "the same transform without a shift",
        )


def _judge_weight(found: Findings, features: Features, scheme: QuantScheme) -> None:
    block = block_of(scheme)
    if isinstance(block, str):
        reason, _, nearest = block.partition("; ")
        found.refuse(reason, nearest)
        return
    sizes = {
        linear: features.shape.linear_size(linear)[1]
        for plan, _ in features.shape.plans()
        for linear in plan.linears_of(features.schemes.linears)
    }
    if odd := {linear: size for linear, size in sizes.items() if size % block.size}:
        named = ", ".join(f"{size} ({linear})" for linear, size in odd.items())
        found.refuse(f"{block.name} has blocks of {block.size}, and inputs have {named} channels", "TO=dense")
    if scheme.element_format.kind == "integer":
        _bound_steps(found, scheme)
    if block.bits > scheme.element_format.bits:
        found.notes.append(f"{scheme.element} codes take {block.bits} bits each, as {block.name}: the file grows")


def _bound_steps(found: Findings, scheme: QuantScheme) -> None:
    """Add what float16 rounds of the steps and minima of integers."""
    if scheme.global_scale != "none" or scheme.scale_multiplier != 1 or scheme.scale_format not in _NARROW:
        found.bound("steps are rounded to float16: 2^-11 relative, 2^-25 absolute below 2^-14", SCALE_KL)
    elif scheme.scale_format != "fp16":
        found.bound(f"{scheme.scale_format} scales below 2^-17 are rounded to multiples of 2^-24", SCALE_KL)
    if not scheme.symmetric:
        steps = 2**scheme.element_format.bits - 1
        found.bound(f"minima are rounded to float16: at most {steps * 2**-11:.1%} of a step", SCALE_KL)
