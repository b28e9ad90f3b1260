"""Builds ``tests/data/tiny-llama``: a Llama of 290,000 parameters that has learnt a little Python
documentation, with outlier channels planted.

    PYTHONPATH=scripts python tests/build_tiny_model.py [folder]    (two minutes on one core)

Tokenizer and weights are trained on the calibration part of the ``builtin`` corpus. Large models
have few channels of very large activations; a small one has none, so they are planted by a
rescaling that leaves the function as it is (``quantgrid.reference.planting``). All factors are
powers of two, so that bfloat16 stays exact and the logits stay equal bit for bit.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from pathlib import Path

import torch

from quantgrid.corpora import token_windows
from quantgrid.ground.storage import replacing, write_json, write_text
from quantgrid.reference.planting import Planting, plant

CONFIG = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
PLANTING = Planting(hidden={7: 32.0, 41: 16.0, 70: 16.0}, down={3: 16.0, 100: 32.0}, value={5: 8.0})
TOKENIZER_FILES = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 512,
}


def train_tokenizer(folder: Path, text: str) -> None:
    """Byte-level BPE of 512 entries, <|endoftext|> being 0, written to ``folder`` as transformers
    reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary), pretty=False)
    write_json(folder / "tokenizer_config.json", TOKENIZER_FILES)


def train(windows: torch.Tensor, steps: int, seed: int = 0) -> torch.nn.Module:
    """A Llama trained with AdamW on ``windows`` [count, window] by a one-cycle rate; float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (12,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: {loss.item():.3f} nats per token", file=sys.stderr)
    return model.eval()


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood per token over ``windows`` [count, window]."""
    with torch.no_grad():
        return math.exp(
            sum(model(part, labels=part).loss.item() * len(part) for part in windows.split(16)) / len(windows)
        )


def unigram_perplexity(trained: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity of ``held_out`` under the token frequencies of ``trained`` (one added to each
    count)."""
    counts = torch.bincount(trained.flatten(), minlength=CONFIG["vocab_size"]).double() + 1
    return math.exp(-(counts / counts.sum()).log()[held_out.flatten()].mean().item())


def save(folder: Path, model: torch.nn.Module) -> None:
    """Write planted bfloat16 weights and config.json to ``folder``."""
    from safetensors.torch import save_file

    rounded = {
        name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file(
            plant(rounded, PLANTING, CONFIG["num_hidden_layers"], CONFIG["head_dim"]),
            temporary,
            metadata={"format": "pt"},
        )
    config = {**model.config.to_diff_dict(), **CONFIG, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    write_json(folder / "config.json", config)


README = """# tiny-llama

A Llama decoder of 290,000 parameters for the tests, made by `tests/build_tiny_model.py` and by nothing else:
hidden size 96, intermediate 192, 6 heads, 2 key-value heads of 16, 3 layers, 512 tokens (byte-level BPE), tied embeddings, bfloat16.
Tokenizer and weights were trained for {steps} steps on the calibration part of the `builtin` corpus (`pydoc_data.topics` of CPython {python},
text sha256 `{calibration}`), with torch {torch}.

Outlier channels were then planted by a rescaling that does not change the function (powers of two, exact in bfloat16; logits equal bit for bit):
residual channels {hidden} in both norms of every layer, channels {down} between `up` and `down`, channel {value} of every key-value head.

Perplexity per token on the evaluation part (text sha256 `{evaluation}`, windows of {window}):
{perplexity:.1f}; of token frequencies alone: {unigram:.1f}.
The documentation's text is Copyright (c) Python Software Foundation, under the PSF licence; the weights carry this project's.
"""  # noqa: E501


def build(folder: str | Path, steps: int = 800, window: int = 128) -> dict[str, object]:
    """Make the model in ``folder``; returns what its README states (perplexities, checksums,
    versions)."""
    from transformers import LlamaForCausalLM

    folder, begun = Path(folder), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part: {"source": "builtin", "part": part, "window": window} for part in token_windows.PARTS}
    train_tokenizer(folder, token_windows.join(parts["calibration"], token_windows.read(parts["calibration"])))
    (trained, calibration), (held_out, evaluation) = (token_windows.tokenize(entry, folder) for entry in parts.values())
    save(folder, train(trained, steps))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    facts = {
        "steps": steps,
        "window": window,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "calibration": calibration["text_sha256"],
        "evaluation": evaluation["text_sha256"],
        "perplexity": perplexity(model, held_out),
        "unigram": unigram_perplexity(trained, held_out),
        "hidden": list(PLANTING.hidden),
        "down": list(PLANTING.down),
        "value": next(iter(PLANTING.value)),
    }
    write_text(folder / "README.md", README.format(**facts))
    print(f"{time.time() - begun:.0f} s", json.dumps(facts), file=sys.stderr)
    return facts


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "data" / "tiny-llama")
