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
ROTATED = """import runpy

load = runpy.run_path(folder + "/load.py")["load"]
model = load(folder, dtype=dtype)
"""
GPTQ = """from transformers import AutoModelForCausalLM, GPTQConfig  # with gptqmodel and optimum installed

config = GPTQConfig(bits=4, backend="gptq_torch")  # the file has the bits; "auto" is faster on a GPU
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", quantization_config=config)
"""
AWQ = """from transformers import AutoModelForCausalLM, AwqConfig  # with gptqmodel installed

config = AwqConfig(backend="torch_awq")  # "auto" is faster on a GPU
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", quantization_config=config)
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
        return Loader("gptqmodel", ("gptqmodel", "optimum"), GPTQ if target == "gptq" else AWQ)
    packages = ("compressed-tensors",) if target == "compressed-tensors" else ()
    code = ROTATED if MARKER in config else DEQUANTIZED if _is_asymmetric_packed(config) else PLAIN
    if adapter:
        return Loader("transformers with PEFT", (*packages, "peft"), code + ADAPTED)
    return Loader("transformers", packages, code)


def _is_asymmetric_packed(config: dict) -> bool:
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    return any(group["format"] == "pack-quantized" and not group["weights"]["symmetric"] for group in groups)
