"""Targets of exports: the rules that judge a cell, and the dtypes that a folder may have. Standard
library only: the grid asks for verdicts while the DAG is built."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ..ground.errors import ConfigError, unknown_name
from . import compressed_capabilities, dense_capabilities, gguf_capabilities, integer_capabilities
from .features import Features
from .verdicts import Verdict, refused

DTYPES = ("bfloat16", "float16", "float32")
AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """``summary``: the format and what loads it. ``judge`` takes features, a dtype and flags.
    ``dtypes`` are those of the exported model, the default first; ``flags`` are accepted ones. ``route``
    is the module with needed(request), write(request, folder), verify(request, folder)."""

    summary: str
    judge: Callable[[Features, str, frozenset[str]], Verdict]
    dtypes: tuple[str, ...] = DTYPES
    flags: tuple[str, ...] = ()
    route: str = "weights"


TARGETS: dict[str, Target] = {
    "compressed-tensors": Target(
        "codes and scales for vLLM, SGLang and transformers",
        compressed_capabilities.judge,
        flags=(compressed_capabilities.ONLINE_ROTATION,),
    ),
    "gguf": Target(
        "one file for llama.cpp and what builds on it (Ollama)",
        gguf_capabilities.judge,
        ("bfloat16",),
        route="gguf_route",
    ),
    "gptq": Target("GPTQ's file format, 4-bit integers and others", integer_capabilities.judge_gptq, ("float16",)),
    "awq": Target("AWQ's file format (gemm), 4-bit integers", integer_capabilities.judge_awq, ("float16",)),
    "dense": Target("dequantized weights for any program, without the saving", dense_capabilities.judge),
}


def target_of(name: str, where: str = "TO") -> Target:
    """Target of this name; :class:`ConfigError` lists the accepted ones."""
    if name not in TARGETS:
        raise ConfigError(f"{where}: {unknown_name('target', name, TARGETS)}")
    return TARGETS[name]


def dtype_of(target: str, dtype: str = AUTO) -> str:
    """Dtype of an exported model; ``auto`` is the target's default. :class:`ConfigError` lists the
    accepted ones."""
    accepted = target_of(target).dtypes
    if dtype == AUTO:
        return accepted[0]
    if dtype not in accepted:
        raise ConfigError(f"dtype '{dtype}': {target} accepts {', '.join(accepted)}")
    return dtype


def judge(target: str, features: Features, dtype: str = AUTO, flags: Collection[str] = ()) -> Verdict:
    """Verdict of a target on a cell; flags that the target does not know are refused."""
    found = target_of(target)
    for flag in flags:
        if flag not in found.flags:
            raise ConfigError(f"flag '{flag}': {target} accepts {', '.join(found.flags) or 'none'}")
    dtype = dtype_of(target, dtype)
    family = features.shape.family
    unwritten = [
        *(["the LayerNorms"] if family.centered else []),
        *(["the latent attention"] if family.latents else []),
        *(["the linear attention"] if family.linear else []),
        *(["the experts in one tensor"] if family.experts is not None and family.experts.is_stacked else []),
    ]
    if unwritten:
        reason = f"no target writes {unwritten[0]} of {features.shape.architecture} yet"
        return refused(target, [f"{reason}; nearest: the same recipe on a model of another family"])
    return found.judge(features, dtype, frozenset(flags))
