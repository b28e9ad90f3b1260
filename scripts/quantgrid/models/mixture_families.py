"""Mixtures of experts with correction biases, leading dense layers or stacked experts as data, part of
``FAMILIES``. Standard library only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import Family
from .mixtures import LINEARS, Experts
from .plans import Kept, Latent

_HEAD_NORMS = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"}
_CORRECTION = "e_score_correction_bias"  # added to the scores of a router for its choice alone
_GROUPS = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "num_experts_per_tok")
_DEEPSEEK: dict[str, Any] = {
    "keys": {"num_experts": "n_routed_experts"},
    "settings": (
        *_GROUPS,
        "n_routed_experts",
        "n_shared_experts",
        "moe_intermediate_size",
        "first_k_dense_replace",
        "use_qk_norm",
    ),
    "experts": Experts(
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_count="n_shared_experts",
        leading="first_k_dense_replace",
        kept=(Kept(f"mlp.gate.{_CORRECTION}", ("experts",)),),
    ),
}
_LATENTS: dict[str, Any] = {
    "biases": dict.fromkeys(("q.a", "k.a", "o"), "attention_bias"),
    "modules": {
        "q": "",
        "q.a": "self_attn.q_a_proj",
        "q.b": "self_attn.q_b_proj",
        "k.a": "self_attn.kv_a_proj_with_mqa",
    },
    "latents": (
        Latent("query", "self_attn.q_a_layernorm", ("q.b",), "query_rank"),
        Latent("key_value", "self_attn.kv_a_layernorm", ("k", "v"), "key_value_rank"),
    ),
    "joined": {"self_attn.kv_b_proj": ("k", "v")},
    "by_head": True,
    "keys": {"num_experts": "n_routed_experts", "head_dim": "v_head_dim"},
    "settings": (
        *_DEEPSEEK["settings"],
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "rope_interleave",
    ),
    "experts": _DEEPSEEK["experts"],
}
_LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_DEEPSEEK_SIZES = {**_LATENT_SIZES, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128}


def _all(*linears: str, key: str | bool) -> dict[str, str | bool]:
    return dict.fromkeys(linears, key)


MIXTURE_FAMILIES: dict[str, Family] = {
    "GptOssForCausalLM": Family(
        "gpt_oss",
        _all("q", "k", "v", "o", key="attention_bias"),
        degree=0,
        defaults={"num_key_value_heads": 8, "head_dim": 64, "attention_bias": True},
        settings=("num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit"),
        kept=(Kept("self_attn.sinks", ("heads",)),),
        sinks=True,
        experts=Experts(
            "intermediate_size",
            {
                "gate": "mlp.experts.gate_up_proj",
                "up": "mlp.experts.gate_up_proj",
                "down": "mlp.experts.down_proj",
            },
            router="mlp.router",
            router_stored="mlp.router.weight",
            transposed=True,
            biased=True,
            clamped=True,
        ),
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        _all("q", "k", "v", key="attention_bias"),
        head_norms=_HEAD_NORMS,
        head_norms_key="use_qk_norm",
        defaults={"num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
        **_DEEPSEEK,
    ),
    "Dots1ForCausalLM": Family(
        "dots1",
        _all("q", "k", "v", "o", key="attention_bias"),
        head_norms=_HEAD_NORMS,
        defaults={"num_key_value_heads": 32},
        **_DEEPSEEK,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2",
        **{
            **_LATENTS,
            "settings": (*_LATENTS["settings"], "topk_method"),
            "experts": replace(_DEEPSEEK["experts"], kept=()),
        },
        defaults={**_DEEPSEEK_SIZES, "n_shared_experts": 2, "n_routed_experts": 64},
        only={"mlp_bias": (False, "biases of shared experts")},
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        **_LATENTS,
        defaults={
            **_DEEPSEEK_SIZES,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
        },
    ),
    "Glm4MoeLiteForCausalLM": Family(
        "glm4_moe_lite",
        **{
            **_LATENTS,
            "settings": (*_LATENTS["settings"], "mlp_layer_types"),
            "experts": replace(_DEEPSEEK["experts"], leading="", listed="mlp_layer_types"),
        },
        defaults={
            **_LATENT_SIZES,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "num_key_value_heads": 20,
            "n_shared_experts": 1,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1536,
        },
    ),
    "HunYuanMoEV1ForCausalLM": Family(
        "hunyuan_v1_moe",
        _all("q", "k", "v", "o", key="attention_bias"),
        head_norms={"self_attn.query_layernorm": "head", "self_attn.key_layernorm": "head"},
        keys={"num_experts_per_tok": "moe_topk"},
        settings=("num_experts", "moe_topk"),
        experts=Experts(
            "intermediate_size",
            router="mlp.gate.wg",
            router_stored="mlp.gate.wg.weight",
            shared="mlp.shared_mlp",
            shared_size="intermediate_size",
        ),
    ),
    "Ernie4_5_MoeForCausalLM": Family(
        "ernie4_5_moe",
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
        keys={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
        only={"use_bias": (False, "biases of shared experts")},
        settings=(
            "moe_num_experts",
            "moe_k",
            "moe_intermediate_size",
            "moe_num_shared_experts",
            "moe_layer_start_index",
            "moe_layer_end_index",
            "moe_layer_interval",
            "moe_norm_min",
        ),
        experts=Experts(
            "moe_intermediate_size",
            shared="mlp.shared_experts",
            shared_count="moe_num_shared_experts",
            interval=("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
            kept=(Kept(f"mlp.gate.moe_statics.{_CORRECTION}", (1, "experts"), f"mlp.moe_statics.{_CORRECTION}"),),
        ),
    ),
    "MiniMaxM2ForCausalLM": Family(
        "minimax_m2",
        head_norms={"self_attn.q_norm": "q", "self_attn.k_norm": "k"},
        defaults={"num_key_value_heads": 8, "head_dim": 128},
        settings=("num_local_experts", "num_experts_per_tok", "rotary_dim"),
        experts=Experts(
            "intermediate_size",
            {
                linear: f"block_sparse_moe.experts.{{expert}}.{name}.weight"
                for linear, name in zip(LINEARS, ("w1", "w3", "w2"))
            },
            router_stored="block_sparse_moe.gate.weight",
            kept=(Kept(f"mlp.{_CORRECTION}", ("experts",), f"block_sparse_moe.{_CORRECTION}"),),
        ),
    ),
    "GraniteMoeForCausalLM": Family(
        "granitemoe",
        _all("q", "k", "v", "o", key="attention_bias"),
        logits={"divide": "logits_scaling"},
        settings=(
            "num_local_experts",
            "num_experts_per_tok",
            "embedding_multiplier",
            "logits_scaling",
            "residual_multiplier",
            "attention_multiplier",
        ),
        experts=Experts(
            "intermediate_size",
            {
                "gate": "block_sparse_moe.input_linear.weight",
                "up": "block_sparse_moe.input_linear.weight",
                "down": "block_sparse_moe.output_linear.weight",
            },
            block="block_sparse_moe",
            router="block_sparse_moe.router",
            router_stored="block_sparse_moe.router.layer.weight",
        ),
    ),
}
