"""Code that loads exported folders in other programs: run by the check, and shown on the card.

Each text defines ``model`` from ``folder`` and ``dtype``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .rotations import MARKER

PLAIN = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
"""
DEQUANTIZED = """from transformers import AutoModelForCausalLM, CompressedTensorsConfig

config = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
"""
ROTATED = """import sys

sys.path.insert(0, folder)  # load.py is in the folder
from load import load

model = load(folder, dtype=dtype)
"""
GPTQMODEL = """from transformers import AutoModelForCausalLM  # with gptqmodel and optimum installed

model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
"""
ADAPTED = """
import torch
from peft import PeftModel

model(torch.tensor([[0]]))  # PEFT finds the weights after a first pass
model = PeftModel.from_pretrained(model, folder + "/adapter")
"""


@dataclass(frozen=True)
class Loader:
    """``name`` of the program, its packages beside transformers, and the ``code`` that loads a folder."""

    name: str
    packages: tuple[str, ...]
    code: str


def loader_of(target: str, config: dict, adapter: bool) -> Loader:
    """Loader that checks an export with this config.json."""
    if target in ("gptq", "awq"):
        return Loader("gptqmodel", ("gptqmodel", "optimum"), GPTQMODEL)
    packages = ("compressed-tensors",) if target == "compressed-tensors" else ()
    code = ROTATED if MARKER in config else DEQUANTIZED if _is_asymmetric_packed(config) else PLAIN
    if adapter:
        return Loader("transformers with PEFT", (*packages, "peft"), code + ADAPTED)
    return Loader("transformers", packages, code)


def _is_asymmetric_packed(config: dict) -> bool:
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    return any(group["format"] == "pack-quantized" and not group["weights"]["symmetric"] for group in groups)
