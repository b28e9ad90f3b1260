"""Sizes and training recipes of the reference models. Plain data.

Most are Llama decoders (RMSNorm, RoPE, grouped-query attention, SwiGLU, tied embeddings, no biases).
Two have other architectures: a mixture of experts with a shared expert (Qwen2-MoE), and norms before and
behind attention and MLP (Gemma 3). The family covers hidden and intermediate sizes that are powers of
two and others (384 = 12 x 32, 768 = 12 x 64, 1152 = 36 x 32), head counts with a Hadamard matrix (4, 8)
and without (6), two and more query heads per key-value head, and groups of 128 that divide every linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .planting import Planting


@dataclass(frozen=True)
class Size:
    """Shape of a decoder, in the terms of transformers' configs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Training:
    """AdamW (decay of matrices only) on ``batch`` windows of ``window`` tokens per step.

    The rate rises to ``rate`` during ``warm_up`` steps, stays, and falls linearly to a tenth during
    the last ``decay_share`` of the steps (a trapezoid, arXiv 2405.18392). Before that it does not
    depend on ``steps``, so a running training can be extended.
    """

    steps: int
    rate: float
    batch: int = 4
    window: int = 512
    warm_up: int = 40
    decay_share: float = 0.35
    final_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    largest_gradient: float = 1.0
    seed: int = 0
    balance: float = 0.0  # weight of the load-balancing loss of a mixture of experts
    products: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of matrix products

    def rate_at(self, step: int) -> float:
        """Learning rate of ``step`` (from 0)."""
        decay = round(self.decay_share * self.steps)
        left = min(1.0, (self.steps - step) / max(1, decay))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (self.final_share + (1 - self.final_share) * left)

    @property
    def autocast(self) -> bool:
        return self.products == "bfloat16"

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.window


@dataclass(frozen=True)
class Reference:
    """A reference model; ``planting`` describes its variant with planted outlier channels.

    ``kind`` names the ``architecture`` in texts; ``settings`` complete the transformers config.
    """

    size: Size
    training: Training
    planting: Planting | None = None
    kind: str = "Llama"
    architecture: str = "LlamaForCausalLM"
    settings: Mapping[str, Any] = field(default_factory=dict)


FAMILY = {
    "reference-1m": Reference(
        Size(128, 384, 4, 4, 2, 32),
        Training(steps=1700, rate=3e-3),
        Planting(hidden={9: 32.0, 50: 16.0, 101: 16.0}, down={3: 16.0, 250: 32.0}, value={5: 8.0}),
    ),
    "reference-4m": Reference(
        Size(256, 768, 4, 8, 2, 32),
        Training(steps=2400, rate=2e-3),
        Planting(hidden={7: 32.0, 100: 16.0, 201: 16.0}, down={3: 16.0, 500: 32.0}, value={5: 8.0}),
    ),
    "reference-12m": Reference(Size(384, 1152, 6, 6, 2, 64), Training(steps=4200, rate=1e-3)),
    "reference-3m-moe": Reference(
        Size(128, 256, 4, 4, 2, 32),
        Training(steps=1700, rate=3e-3, balance=0.01, products="float32"),
        kind="Qwen2-MoE",
        architecture="Qwen2MoeForCausalLM",
        settings={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
        },
    ),
    "reference-1m-gemma3": Reference(
        Size(128, 384, 4, 4, 2, 32),
        Training(steps=1700, rate=3e-3, products="float32"),
        kind="Gemma 3",
        architecture="Gemma3ForCausalLM",
        settings={
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 256,
            "query_pre_attn_scalar": 32,
        },
    ),
}
SMALLEST = "reference-1m"
