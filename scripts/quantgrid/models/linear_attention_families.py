"""Decoder families with linear attention in most layers as data, part of ``FAMILIES``. Standard library only.

A layer with linear attention (Gated DeltaNet, arXiv 2412.06464) convolves queries, keys and values over
tokens and keeps one matrix per head in place of the keys and values of all tokens. Its linears have the
roles ``q.linear``, ``k.linear``, ``v.linear``, ``o.linear``; ``q.gate`` computes the gate of the outputs,
``write`` and ``decay`` one number per head and token.
"""

from __future__ import annotations

from typing import Any

from .family import Family
from .mixtures import GATED_SHARED, Experts
from .plans import Kept

_ATTENTION = "linear_attn"
_TOGETHER = ("q.linear", "k.linear", "v.linear")  # in one linear of transformers
_LINEAR: dict[str, Any] = {
    "attention": _ATTENTION,
    "modules": {
        **dict.fromkeys(("q", "k", "v", "o"), ""),
        **dict.fromkeys(_TOGETHER, f"{_ATTENTION}.in_proj_qkv"),
        "q.gate": f"{_ATTENTION}.in_proj_z",
        "o.linear": f"{_ATTENTION}.out_proj",
    },
    "joined": {f"{_ATTENTION}.in_proj_qkv": _TOGETHER},
    "readers": {"write": f"{_ATTENTION}.in_proj_b", "decay": f"{_ATTENTION}.in_proj_a"},
    "output_norm": f"{_ATTENTION}.norm",
    "head_norms": {},
    "kept": (
        Kept(f"{_ATTENTION}.conv1d.weight", ("convolved", 1, "convolution")),
        Kept(f"{_ATTENTION}.dt_bias", ("linear_heads",)),
        Kept(f"{_ATTENTION}.A_log", ("linear_heads",)),
    ),
}
_SIZES = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_QWEN: dict[str, Any] = {
    "biases": dict.fromkeys(("q", "k", "v", "o"), "attention_bias"),
    "gain_offset": 1.0,
    "head_norms": {"self_attn.q_norm": "head", "self_attn.k_norm": "head"},
    "output_gate": True,
    "linear": _LINEAR,
}
_SETTINGS = (*_SIZES, "full_attention_interval")

LINEAR_ATTENTION_FAMILIES: dict[str, Family] = {
    "Qwen3_5ForCausalLM": Family(
        "qwen3_5_text",
        **_QWEN,
        defaults={**_SIZES, "num_key_value_heads": 4, "head_dim": 256},
        settings=_SETTINGS,
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "qwen3_5_moe_text",
        **_QWEN,
        defaults={**_SIZES, "num_key_value_heads": 2, "head_dim": 256},
        keys={"intermediate_size": "moe_intermediate_size"},  # no layer has an MLP
        settings=(
            *_SETTINGS,
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ),
        experts=Experts("moe_intermediate_size", **GATED_SHARED),
    ),
}
