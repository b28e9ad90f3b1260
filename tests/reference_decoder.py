"""An independent decoder in float64, written from the definition: the oracle that transforms are
checked against.

Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions (default scaling), grouped-query
attention, SwiGLU; every bias and q/k norm that the state holds is used, the head is tied where the
state holds no ``lm_head.weight``. It imports nothing of quantgrid, and nothing is rounded to
float32, so that a function-preserving transform shows at 1e-9 (transformers' RMSNorm rounds to
float32: 1e-5 there). Sources: arXiv 2302.13971 (Llama), 2104.09864 (RoPE), 2305.13245 (GQA),
2002.05202 (SwiGLU), 2505.09388 (Qwen3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Online = Callable[[int, str, Tensor], Tensor]
Heads = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def logits(
    state: dict[str, Tensor], config: dict, tokens: Tensor, online: Online | None = None, heads: Heads | None = None
) -> Tensor:
    """(batch, time, vocabulary) float64 logits of a decoder given by Hugging Face tensor names and
    config.json's content.

    ``tokens``: (batch, time) integers. ``online(layer, site, x)`` replaces the input x (batch,
    time, n) of the linears of a site (``attention_input``, ``output_input``, ``mlp_input``,
    ``down_input``), once per site and layer. ``heads(layer, query, key, value)`` replaces what
    attention works on, after rotary positions: (batch, time, heads or KV heads, head_dim) each.
    """
    _refuse_what_is_not_modelled(config, tokens.shape[1])
    state = {name: tensor.to(torch.float64) for name, tensor in state.items()}
    hook = online or (lambda layer, site, x: x)
    attended = heads or (lambda layer, *states: states)
    stream = state["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        stream = _layer(inside, config, stream, partial(hook, layer), partial(attended, layer))
    final = rms_norm(stream, state["model.norm.weight"], config["rms_norm_eps"])
    return final @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T


def site_inputs(state: dict[str, Tensor], config: dict, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    """(layer, site) -> (batch * time, n) float64: what the linears of every site read."""
    seen: dict[tuple[int, str], Tensor] = {}

    def record(layer: int, site: str, x: Tensor) -> Tensor:
        seen[layer, site] = x.flatten(0, 1)
        return x

    logits(state, config, tokens, record)
    return seen


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gain along the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * gain


def _refuse_what_is_not_modelled(config: dict, time: int) -> None:
    """A ValueError instead of silently different numbers."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"the reference decoder has default rotary positions only, not '{kind}'")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the reference decoder has SiLU only, not '{config['hidden_act']}'")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and time > window:
        raise ValueError(
            f"the reference decoder has full attention only; {time} tokens exceed the sliding window of {window}"
        )


def _linear(inside: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias if the layer holds one."""
    product = x @ inside[f"{name}.weight"].T
    return product + inside[f"{name}.bias"] if f"{name}.bias" in inside else product


def _layer(
    inside: dict[str, Tensor], config: dict, stream: Tensor, hook: Callable[[str, Tensor], Tensor], heads: Callable
) -> Tensor:
    """One pre-norm decoder layer; ``inside``: its tensors by their names below
    ``model.layers.{i}.``."""
    epsilon = config["rms_norm_eps"]
    x = hook("attention_input", rms_norm(stream, inside["input_layernorm.weight"], epsilon))
    attended = hook("output_input", _attention(inside, config, x, heads))
    stream = stream + _linear(inside, "self_attn.o_proj", attended)
    x = hook("mlp_input", rms_norm(stream, inside["post_attention_layernorm.weight"], epsilon))
    gate = _linear(inside, "mlp.gate_proj", x)
    gated = hook("down_input", gate / (1 + torch.exp(-gate)) * _linear(inside, "mlp.up_proj", x))
    return stream + _linear(inside, "mlp.down_proj", gated)


def _attention(inside: dict[str, Tensor], config: dict, x: Tensor, hook: Callable) -> Tensor:
    """(batch, time, heads * head_dim): causal attention, query head h reading KV head h // (heads /
    kv_heads)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    query, key, value = (_linear(inside, f"self_attn.{name}_proj", x).unflatten(-1, (-1, head_dim)) for name in "qkv")
    if "self_attn.q_norm.weight" in inside:
        query = rms_norm(query, inside["self_attn.q_norm.weight"], config["rms_norm_eps"])
        key = rms_norm(key, inside["self_attn.k_norm.weight"], config["rms_norm_eps"])
    query, key, value = hook(
        rotate_positions(query, rope_theta(config)), rotate_positions(key, rope_theta(config)), value
    )
    time = x.shape[1]
    future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
    outputs = []
    for head in range(heads):
        group = head * kv_heads // heads
        scores = query[:, :, head] @ key[:, :, group].transpose(1, 2) / math.sqrt(head_dim)
        outputs.append(torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ value[:, :, group])
    return torch.cat(outputs, dim=-1)


def rope_theta(config: dict) -> float:
    """The base of the rotary angles, where transformers 5 (``rope_parameters``) or 4
    (``rope_theta``) writes it."""
    return (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0


def rotate_positions(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x (batch, time, heads, head_dim): channels i and i + head_dim / 2 turn by
    position / theta**(2i / head_dim)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)
