"""Decoder families as data: one row for each architecture of transformers.

A row states what distinguishes the architecture from Llama's (``family.py``). Standard library only.
"""

from __future__ import annotations

from .family import Family
from .layer_norm_families import LAYER_NORM_FAMILIES
from .linear_attention_families import LINEAR_ATTENTION_FAMILIES
from .mixture_families import MIXTURE_FAMILIES
from .mixtures import GATED_SHARED, Experts


def _all(*linears: str, key: str | bool) -> dict[str, str | bool]:
    return dict.fromkeys(linears, key)


_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
_ATTENTION_BIAS = _all(*_ATTENTION, key="attention_bias")
_MLP_BIAS = _all(*_MLP, key="mlp_bias")
_HEAD_NORMS = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"}
_WIDE_NORMS = {"self_attn.q_norm": "q", "self_attn.k_norm": "k"}
_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
_ONLY_BEHIND = {**_BEHIND, "attention_norm": None, "mlp_norm": None}
_GATE_UP = {"mlp.gate_up_proj": ("gate", "up")}
_SOFTCAP = {"softcap": "final_logit_softcapping"}
_GEMMA = {"biases": _ATTENTION_BIAS, "gain_offset": 1.0}
_TIED = {"tie_word_embeddings": True}
_GLM = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
_GEMMA_SIZES = {**_TIED, "num_key_value_heads": 4, "head_dim": 256}
_GEMMA_SETTINGS = (
    "hidden_activation",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
)
_GEMMA_NORMS = {**_BEHIND, "mlp_norm": "pre_feedforward_layernorm"}

COUNT_KEYS = ("num_experts", "num_local_experts")  # of config.json, by version of transformers
_SPARSE = (*COUNT_KEYS, "num_experts_per_tok", "norm_topk_prob")
_SKIPS = ("mlp_only_layers", "decoder_sparse_step")

# architecture, as named in config.json -> its family
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", {**_ATTENTION_BIAS, **_MLP_BIAS}),
    "MistralForCausalLM": Family("mistral", defaults={"num_key_value_heads": 8}),
    "MinistralForCausalLM": Family("ministral", defaults={"num_key_value_heads": 8}),
    "Ministral3ForCausalLM": Family("ministral3", defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "Qwen2ForCausalLM": Family("qwen2", _all("q", "k", "v", key=True), defaults={"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Family(
        "qwen3", _ATTENTION_BIAS, head_norms=_HEAD_NORMS, defaults={"num_key_value_heads": 32, "head_dim": 128}
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {**_ATTENTION_BIAS, **_MLP_BIAS},
        defaults={**_TIED, "num_key_value_heads": 4},
        settings=("no_rope_layers", "no_rope_layer_interval"),
    ),
    "ArceeForCausalLM": Family(
        "arcee",
        {**_ATTENTION_BIAS, **_all("up", "down", key="mlp_bias")},
        gated=False,
        degree=2,
        only={"hidden_act": ("relu2", "an activation that the plan of this family does not describe")},
    ),
    "CwmForCausalLM": Family("cwm", _MLP_BIAS, defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        {**_all("q", "k", "v", key="attention_bias"), "o": "attention_out_bias", **_MLP_BIAS},
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
        settings=("attention_out_bias",),
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        _all(*_ATTENTION, *_MLP, key="use_bias"),
        defaults={**_TIED, "num_key_value_heads": 2, "head_dim": 128},
        settings=("use_bias",),
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        "hunyuan_v1_dense",
        _ATTENTION_BIAS,
        head_norms={"self_attn.query_layernorm": "head", "self_attn.key_layernorm": "head"},
    ),
    "GraniteForCausalLM": Family(
        "granite",
        {**_ATTENTION_BIAS, **_MLP_BIAS},
        logits={"divide": "logits_scaling"},
        settings=("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        joined={"self_attn.qkv_proj": ("q", "k", "v"), **_GATE_UP},
        settings=("original_max_position_embeddings",),
    ),
    "GlmForCausalLM": Family("glm", _all("q", "k", "v", key="attention_bias"), joined=_GATE_UP, defaults=_GLM),
    "Glm4ForCausalLM": Family(
        "glm4",
        _all("q", "k", "v", key="attention_bias"),
        post_attention_norm="post_self_attn_layernorm",
        post_mlp_norm="post_mlp_layernorm",
        joined=_GATE_UP,
        defaults=_GLM,
    ),
    "GemmaForCausalLM": Family(
        "gemma", **_GEMMA, defaults={**_TIED, "num_key_value_heads": 16, "head_dim": 256}, settings=_GEMMA_SETTINGS
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        **_GEMMA,
        **_GEMMA_NORMS,
        logits=_SOFTCAP,
        defaults={**_GEMMA_SIZES, "final_logit_softcapping": 30.0},
        settings=_GEMMA_SETTINGS,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        **_GEMMA,
        **_GEMMA_NORMS,
        head_norms=_HEAD_NORMS,
        logits=_SOFTCAP,
        defaults={**_GEMMA_SIZES, "num_attention_heads": 8, "vocab_size": 262208},
        settings=(*_GEMMA_SETTINGS, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"),
    ),
    "Olmo2ForCausalLM": Family("olmo2", _ATTENTION_BIAS, **_ONLY_BEHIND, head_norms=_WIDE_NORMS),
    "Olmo3ForCausalLM": Family("olmo3", _ATTENTION_BIAS, **_ONLY_BEHIND, head_norms=_WIDE_NORMS),
    "Exaone4ForCausalLM": Family(
        "exaone4",
        **_ONLY_BEHIND,
        head_norms=_HEAD_NORMS,
        defaults={"num_key_value_heads": 32},
        settings=("sliding_window_pattern",),
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        defaults={"num_key_value_heads": 8},
        settings=_SPARSE,
        experts=Experts(
            "intermediate_size",
            {
                linear: f"block_sparse_moe.experts.{{expert}}.{name}.weight"
                for linear, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
            },
            router_stored="block_sparse_moe.gate.weight",
        ),
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        _all("q", "k", "v", key="qkv_bias"),
        defaults={"qkv_bias": True, "num_key_value_heads": 16},
        settings=(
            *_SPARSE,
            *_SKIPS,
            "qkv_bias",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ),
        experts=Experts("moe_intermediate_size", **GATED_SHARED, skips=True),
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        _ATTENTION_BIAS,
        head_norms=_HEAD_NORMS,
        defaults={"num_key_value_heads": 4},
        settings=(*_SPARSE, *_SKIPS, "moe_intermediate_size"),
        experts=Experts("moe_intermediate_size", skips=True),
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        _ATTENTION_BIAS,
        head_norms=_WIDE_NORMS,
        settings=(*_SPARSE, "clip_qkv"),
        experts=Experts("intermediate_size"),
    ),
    **MIXTURE_FAMILIES,
    **LAYER_NORM_FAMILIES,
    **LINEAR_ATTENTION_FAMILIES,
}
MODEL_TYPES: dict[str, str] = {family.model_type: name for name, family in FAMILIES.items()}
# what stands in the way of architectures that people ask for, by the beginning of their model type
OBSTACLES: dict[str, str] = {
    "qwen3_next": "linear attention whose linears hold queries, keys, values and gates of each head in turn",
    "deepseek_v32": "sparse attention by an indexer",
    "deepseek_v4": "sparse attention over compressed keys and values",
    "glm_moe_dsa": "sparse attention by an indexer",
    "granitemoeshared": "a shared expert with gate and up in one linear",
    "granitemoehybrid": "state-space layers",
    "exaone_moe": "layers with experts listed one by one",
    "minicpm3": "logits scaled by a ratio of sizes",
    "gemma3n": "per-layer embeddings",
    "gemma4": "norms on values and per-layer embeddings",
    "llama4": "experts whose input is scaled by the router",
    "olmo": "LayerNorm without parameters",
    "nemotron_h": "state-space layers",
    "gpt_neox_japanese": "a bias of attention outside of its linears",
    "gpt_neo": "local attention by masks in its files",
    "bloom": "attention outside of transformers' interface, so that its keys and values cannot be rounded",
    "falcon_mamba": "state-space layers",
    "falcon_h1": "state-space layers",
    "falcon": "attention outside of transformers' interface, so that its keys and values cannot be rounded",
    "gptj": "attention outside of transformers' interface, so that its keys and values cannot be rounded",
    "mpt": "attention outside of transformers' interface, so that its keys and values cannot be rounded",
    "phimoe": "a router that masks experts by thresholds",
    "apertus": "an activation with learned parameters",
    "nanochat": "norms without parameters",
    "lfm2": "convolutions",
    "mamba": "state-space layers",
    "jamba": "state-space layers",
}
