"""GGUF files as float32 checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..ground.storage import replacing


def convert_gguf(gguf: Path, folder: Path) -> dict[str, Any]:
    """Convert a GGUF file to float32 safetensors and a tokenizer in ``folder``; return its config.

    transformers reads the file.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _read_once():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            trust_remote_code=False,
            # explicit: with the `kernels` package installed, transformers would keep the weights quantized
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.float().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers read a GGUF file once. It opens one for the config, one for the weights and
    one for the tokenizer, and each reads the vocabulary entry by entry."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def by_frequency(types: list[str]) -> str:
    """Element types of tensors by frequency, such as "211 Q4_1, 61 F32 tensors"."""
    return ", ".join(f"{count} {name}" for name, count in Counter(types).most_common()) + " tensors"
