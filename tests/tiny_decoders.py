"""Random decoders of a few thousand parameters, in every shape that the library has to get right,
as (config, state) or as a folder.

``build`` draws one, ``save`` writes it as transformers reads it, ``CASES`` holds the four
architectures with both GQA shapes, tied and untied, and the variants of biases and head size. Norm
gains average 1 with a few small and a few large channels, so that a forgotten gain shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# (architecture, with bias) -> the linears that hold one; what is not here does not exist in
# transformers
BIASED = {
    ("LlamaForCausalLM", False): (),
    ("LlamaForCausalLM", True): ("q", "k", "v", "o", "gate", "up", "down"),
    ("MistralForCausalLM", False): (),
    ("Qwen2ForCausalLM", True): ("q", "k", "v"),
    ("Qwen3ForCausalLM", False): (),
    ("Qwen3ForCausalLM", True): ("q", "k", "v", "o"),
}

# site -> role of the norm before it, in families like Llama
NORM_OF = {"attention_input": "attention_norm", "mlp_input": "mlp_norm"}


def bare_name(layer: int, linear: str) -> str:
    """Module name of a linear of a family like Llama, such as ``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{'mlp' if linear in ('gate', 'up', 'down') else 'self_attn'}.{linear}_proj"


@dataclass(frozen=True)
class Case:
    """The arguments of :func:`build`; ``bias=None`` is the architecture's own default."""

    architecture: str
    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 61
    tied: bool = False
    bias: bool | None = None
    seed: int = 0

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        name = f"{MODEL_TYPES[self.architecture]}-{self.hidden}-gqa{self.heads}_{self.kv_heads}-{tied}"
        return (
            name
            + ("-bias" if self.bias else "")
            + ("" if self.hidden == self.heads * self.head_dim else f"-head{self.head_dim}")
        )

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[dict, dict[str, Tensor]]:
        """(config, state) of this case."""
        return build(**asdict(self), dtype=dtype)


_SHAPES = (
    {"hidden": 144, "intermediate": 192, "heads": 9, "kv_heads": 3, "seed": 1},
    {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "seed": 2},
)
CASES: list[Case] = [
    Case(architecture, tied=tied, **shape)
    for architecture in MODEL_TYPES
    for shape in _SHAPES
    for tied in (True, False)
]
CASES += [
    Case("LlamaForCausalLM", bias=True, tied=True, seed=3),
    Case("Qwen3ForCausalLM", bias=True, head_dim=32, seed=4),
    Case("MistralForCausalLM", head_dim=32, tied=True, seed=5),
]
# a few of them that differ in shape, bias, head and family
VARIED = [
    next(case for case in CASES if case.architecture.startswith(name) and want(case))
    for name, want in (
        ("Llama", lambda c: c.heads == 9 and c.tied),
        ("Llama", lambda c: c.bias),
        ("Qwen2", lambda c: not c.tied),
        ("Qwen3", lambda c: c.bias),
        ("Mistral", lambda c: c.head_dim == 32),
    )
]


def build(
    architecture: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool,
    bias: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict, dict[str, Tensor]]:
    """(config, state): a random decoder with Hugging Face tensor names, and the config.json content
    that describes it.

    The same ``seed`` gives the same numbers in every ``dtype`` (drawn in float64, then rounded).
    """
    bias = architecture == "Qwen2ForCausalLM" if bias is None else bias
    if (architecture, bias) not in BIASED:
        raise ValueError(f"transformers has no {architecture} with bias={bias}")
    config = _config(architecture, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, bias)
    generator = torch.Generator().manual_seed(seed)
    state = {"model.embed_tokens.weight": _normal((vocab, hidden), generator)}
    for layer in range(layers):
        tensors = _layer(config, BIASED[architecture, bias], generator)
        state |= {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    state["model.norm.weight"] = _gain(hidden, generator)
    if not tied:
        state["lm_head.weight"] = _normal((vocab, hidden), generator) * hidden**-0.5
    return config, {name: tensor.to(dtype) for name, tensor in state.items()}


def _config(
    architecture: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool,
    bias: bool,
) -> dict:
    """Content of config.json, in the keys of transformers 5."""
    config = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        config["attention_bias"] = bias
    if architecture == "LlamaForCausalLM":
        config["mlp_bias"] = bias
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = None
    return config


def _layer(config: dict, biased: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of one decoder layer, by their names below ``model.layers.{i}.``."""
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    sizes = {
        "q": (query, hidden),
        "k": (key_value, hidden),
        "v": (key_value, hidden),
        "o": (hidden, query),
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }
    tensors = {
        "input_layernorm.weight": _gain(hidden, generator),
        "post_attention_layernorm.weight": _gain(hidden, generator),
    }
    for linear, (rows, columns) in sizes.items():
        module = f"{'self_attn' if linear in 'qkvo' else 'mlp'}.{linear}_proj"
        tensors[f"{module}.weight"] = _normal((rows, columns), generator) * columns**-0.5
        if linear in biased:
            tensors[f"{module}.bias"] = _normal((rows,), generator) * 0.3
    if config["model_type"] == "qwen3":
        tensors |= {f"self_attn.{linear}_norm.weight": _gain(head_dim, generator) for linear in "qk"}
    return tensors


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _gain(size: int, generator: torch.Generator) -> Tensor:
    """(size,) positive, mean exactly 1, one channel in eight 20 times smaller and one in sixteen 4
    times larger than the rest."""
    gain = 1 + 0.2 * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    order = torch.randperm(size, generator=generator)
    gain[order[: size // 8]] /= 20
    gain[order[size // 8 : size // 8 + size // 16]] *= 4
    return gain / gain.mean()


def random_tokens(config: dict, batch: int = 2, time: int = 12, seed: int = 0) -> Tensor:
    """(batch, time) token numbers below the config's vocabulary."""
    return torch.randint(config["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(seed))


def save(folder: str | Path, config: dict, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Write config.json and model.safetensors (no tokenizer) into ``folder``; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=1, sort_keys=True) + "\n"
    )
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
