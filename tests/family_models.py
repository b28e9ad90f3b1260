"""Tiny models of every family, built by transformers from its config classes and filled with numbers that
show mistakes: gains far from one, biases, logits far from uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantgrid.calibration.collect import collect
from quantgrid.calibration.statistics import to_tensors
from quantgrid.calibration.streaming import FullPrecision, streamed
from quantgrid.ground.storage import write_tensors
from quantgrid.models.families import FAMILIES

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
LATENT: dict[str, Any] = {
    **DEEPSEEK,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 8,
    "attention_bias": True,
}
GROUPS = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
# what makes a part of a family count: scalars, biases, sliding windows shorter than the text
SPECIFIC: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "ArceeForCausalLM": {"mlp_bias": True},
    "SeedOssForCausalLM": {"attention_out_bias": True, "mlp_bias": True},
    "Ernie4_5ForCausalLM": {"use_bias": True},
    "GraniteForCausalLM": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
    "GemmaForCausalLM": {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 24, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "CwmForCausalLM": {"mlp_bias": True, "sliding_window": 8},
    "MinistralForCausalLM": {"sliding_window": 8},
    "Olmo3ForCausalLM": {"sliding_window": 8},
    "Exaone4ForCausalLM": {"sliding_window": 8},
    "MixtralForCausalLM": {"num_local_experts": 5, "intermediate_size": 48},
    "Qwen2MoeForCausalLM": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "Qwen3MoeForCausalLM": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "OlmoeForCausalLM": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48},
    "Phi3ForCausalLM": {"head_dim": 16},
    "GptOssForCausalLM": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
    },
    "Glm4MoeForCausalLM": {**DEEPSEEK, "n_group": 2, "topk_group": 1, "use_qk_norm": True},
    "Dots1ForCausalLM": {**DEEPSEEK, "first_k_dense_replace": 1},
    "DeepseekV2ForCausalLM": {
        **LATENT,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "DeepseekV3ForCausalLM": {**LATENT, **GROUPS, "q_lora_rank": None},
    "Glm4MoeLiteForCausalLM": {**LATENT, "v_head_dim": 32},
    "HunYuanMoEV1ForCausalLM": {"num_experts": 5, "moe_topk": 2, "intermediate_size": 48},
    "Ernie4_5_MoeForCausalLM": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "moe_layer_end_index": 1,
        "tie_word_embeddings": True,
    },
    "MiniMaxM2ForCausalLM": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48},
    "GraniteMoeForCausalLM": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 4.0,
    },
    "OPTForCausalLM": {"ffn_dim": 96, "tie_word_embeddings": True},
    "Qwen3_5ForCausalLM": {**LINEAR, "attention_bias": True},
    "Qwen3_5MoeForCausalLM": {
        **LINEAR,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "GPT2LMHeadModel": {"n_inner": 96, "tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": True},
    "GPTNeoXForCausalLM": {"rotary_pct": 0.5},
    "StableLmForCausalLM": {"use_qkv_bias": True},
    "NemotronForCausalLM": {"mlp_bias": True},
    "CohereForCausalLM": {"logit_scale": 0.5, "tie_word_embeddings": True},
    "Cohere2ForCausalLM": {"logit_scale": 0.5, "sliding_window": 8, "layer_types": LAYER_TYPES},
}


def build(architecture: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a tiny model of ``architecture`` in ``folder`` and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, **SPECIFIC.get(architecture, {}), **settings}
    config = AutoConfig.for_model(FAMILIES[architecture].model_type, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert type(model).__name__ == architecture
    disturb(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Replace parameters and persistent buffers by numbers that count: none is zero, one, or small."""
    for name, parameter in model.named_parameters():
        if name.endswith("correction_bias"):
            parameter.uniform_(-0.05, 0.05)
        elif name.endswith("A_log"):
            parameter.uniform_(-1, 1)
        elif "norm" in name or "ln_" in name:
            parameter.add_(0.4 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.uniform_(-0.3, 0.3)
    model.tie_weights()


def calibrate(folder: Path, path: Path, tokens: torch.Tensor, **options: Any) -> Path:
    """Write the statistics of a model over ``tokens`` (windows, tokens) as a calibration does; returns ``path``."""
    found = collect(streamed(FullPrecision(folder)), tokens, **{"samples": 16, **options})
    tensors = {
        key: tensor for name, statistics in found.items() for key, tensor in to_tensors(name, statistics).items()
    }
    write_tensors(path, tensors, {})
    return path


def some_tokens(count: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token ids (count, length)."""
    return torch.randint(3, SIZES["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))
