"""Decoder families with LayerNorm as data, part of ``FAMILIES``. Standard library only."""

from __future__ import annotations

from typing import Any

from .family import Family


def _all(*linears: str, key: str | bool) -> dict[str, str | bool]:
    return dict.fromkeys(linears, key)


_ATTENTION = ("q", "k", "v", "o")
_ATTENTION_BIAS = _all(*_ATTENTION, key="attention_bias")
_ALL_BIASES = _all(*_ATTENTION, "up", "down", key=True)
_LAYER_NORM: dict[str, Any] = {"centered": True, "norm_bias": True}
_COHERE: dict[str, Any] = {
    "centered": True,
    "parallel": True,
    "logits": {"multiply": "logit_scale"},
    "defaults": {"tie_word_embeddings": True, "logit_scale": 0.0625},
}
_EQUAL_HEADS = {"num_key_value_heads": "", "head_dim": ""}
_HEAD_LAYER_NORMS = (False, "LayerNorms of queries and keys")
_UNKNOWN_ACTIVATION = "an activation that the plan of this family does not describe"

LAYER_NORM_FAMILIES: dict[str, Family] = {
    "OPTForCausalLM": Family(
        "opt",
        _all(*_ATTENTION, "up", "down", key="enable_bias"),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        **_LAYER_NORM,
        modules={"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
        gated=False,
        names={"model": "model.decoder", "model.norm": "model.decoder.final_layer_norm"},
        positions=2,
        defaults={"tie_word_embeddings": True, "enable_bias": True, "max_position_embeddings": 2048},
        keys={"intermediate_size": "ffn_dim", **_EQUAL_HEADS},
        only={
            "do_layer_norm_before": (True, "norms behind attention and MLP, on the stream itself"),
            "_remove_final_layer_norm": (False, "no final norm"),
            "layer_norm_elementwise_affine": (True, "LayerNorms without parameters"),
            "activation_function": ("relu", _UNKNOWN_ACTIVATION),
        },
        settings=("ffn_dim", "word_embed_proj_dim", "enable_bias"),
    ),
    "GPT2LMHeadModel": Family(
        "gpt2",
        _ALL_BIASES,
        attention_norm="ln_1",
        mlp_norm="ln_2",
        **_LAYER_NORM,
        joined={"attn.c_attn": ("q", "k", "v")},
        transposed=True,
        modules={"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        attention="attn",
        gated=False,
        degree=0,
        names={
            "model": "transformer",
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
        },
        positions=0,
        defaults={"tie_word_embeddings": True, "n_positions": 1024},
        keys={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            **_EQUAL_HEADS,
        },
        inner=4,
        only={
            "add_cross_attention": (False, "attention to another model"),
            "reorder_and_upcast_attn": (False, "attention outside of transformers' interface"),
        },
        settings=(
            "n_embd",
            "n_inner",
            "n_layer",
            "n_head",
            "n_positions",
            "activation_function",
            "layer_norm_epsilon",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
        ),
        ignored=(r".*\.attn\.(masked_)?bias",),
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        {**_all(*_ATTENTION, key="attention_bias"), "up": True, "down": True},
        **_LAYER_NORM,
        joined={"attention.query_key_value": ("q", "k", "v")},
        by_head=True,
        modules={"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        attention="attention",
        gated=False,
        degree=0,
        names={
            "model": "gpt_neox",
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.norm": "gpt_neox.final_layer_norm",
        },
        files={"lm_head": "embed_out"},
        keys=_EQUAL_HEADS,
        defaults={"attention_bias": True},
        settings=("layer_norm_eps", "use_parallel_residual", "rotary_pct", "rotary_emb_base"),
        ignored=(r".*\.attention\.(masked_)?bias",),
    ),
    "PhiForCausalLM": Family(
        "phi",
        _ALL_BIASES,
        **_LAYER_NORM,
        parallel=True,
        modules={"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
        gated=False,
        degree=0,
        names={"model.norm": "model.final_layernorm"},
        head_bias=True,
        only={"qk_layernorm": _HEAD_LAYER_NORMS},
        settings=("layer_norm_eps",),
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        _all("q", "k", "v", key="use_qkv_bias"),
        **_LAYER_NORM,
        defaults={"num_key_value_heads": 32},
        keys={"head_dim": ""},
        only={
            "qk_layernorm": _HEAD_LAYER_NORMS,
            "use_parallel_residual": (False, "one norm for attention and MLP"),
        },
        settings=("layer_norm_eps", "use_qkv_bias"),
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        _all(*_ATTENTION, "up", "down", key="use_bias"),
        **_LAYER_NORM,
        modules={"up": "mlp.c_fc", "down": "mlp.c_proj"},
        gated=False,
        degree=0,
        defaults={"tie_word_embeddings": True, "num_key_value_heads": 2, "use_bias": True},
        settings=("norm_epsilon", "use_bias"),
    ),
    "NemotronForCausalLM": Family(
        "nemotron",
        {**_ATTENTION_BIAS, **_all("up", "down", key="mlp_bias")},
        **_LAYER_NORM,
        gain_offset=1.0,
        gated=False,
        degree=2,
        only={"hidden_act": ("relu2", _UNKNOWN_ACTIVATION)},
        settings=("norm_eps",),
    ),
    "CohereForCausalLM": Family(
        "cohere",
        _ATTENTION_BIAS,
        **_COHERE,
        only={"use_qk_norm": _HEAD_LAYER_NORMS},
        settings=("layer_norm_eps", "logit_scale"),
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        _ATTENTION_BIAS,
        **_COHERE,
        settings=("layer_norm_eps", "logit_scale", "sliding_window_pattern"),
    ),
}
