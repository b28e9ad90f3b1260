"""Cells and tokenizers for the tests of GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from export_cases import Source, in_bfloat16
from quantgrid.corpora import token_windows
from quantgrid.exports.gguf_tokenizer import GGUFTokenizer
from quantgrid.ground.places import ROOT

TINY_LLAMA = ROOT / "tests" / "data" / "tiny-llama"  # 6 heads, 2 for keys and values; with a tokenizer
FP16 = {"scale_format": "fp16"}
Q4_0: dict[str, Any] = {"preset": "int4", "weight": FP16, "activation": None}
Q4_1: dict[str, Any] = {"preset": "int4_asym", "weight": FP16, "activation": None}
Q8_0: dict[str, Any] = {"preset": "int8", "weight": FP16, "activation": None}
MXFP4: dict[str, Any] = {"preset": "mxfp4", "activation": None}
NVFP4: dict[str, Any] = {"preset": "nvfp4", "activation": None}
FORMATS = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q8_0": Q8_0, "MXFP4": MXFP4}


def letters(count: int) -> GGUFTokenizer:
    """A tokenizer of ``count`` printable characters, for models that have none."""
    return GGUFTokenizer(
        "gpt2", "gpt-2", [chr(33 + index) for index in range(count)], [1] * count, ["! !"], special={"bos": 1, "eos": 2}
    )


def trained(folder: Path, model: Path = TINY_LLAMA) -> Source:
    """A trained Llama, in bfloat16 values, and windows of real text."""
    model = Path(shutil.copytree(model, folder / "model"))
    in_bfloat16(model)
    windows, _ = token_windows.tokenize({"source": "builtin", "part": "evaluation", "windows": 2, "window": 64}, model)
    return Source.of(model, folder, windows)
