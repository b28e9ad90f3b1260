"""Online rotations of an export: matrices beside the weights, their description for loaders that run
them, and a file that runs them in transformers.

A matrix has entries of +-1 and order n: y = x M / sqrt(n), on every run of n channels. Names and
description follow compressed-tensors' ``transform/``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..linalg.hadamard import apply_hadamard
from ..quantization.packed_linears import PackedLinear

MARKER = "quantgrid_online_rotations"  # key of config.json: patterns of linears -> order of the matrix
LOADER = '''"""Load this folder in transformers, with the rotations of inputs that its weights expect.

    model = runpy.run_path("FOLDER/load.py")["load"]("FOLDER")

Without them the results are wrong, and transformers says nothing.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def load(folder, **options):
    folder = Path(folder)
    wanted = json.loads((folder / "config.json").read_text())["quantgrid_online_rotations"]
    model, found = AutoModelForCausalLM.from_pretrained(folder, **options), {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if ".online_" in name}
    for name, module in model.named_modules():
        for number, (pattern, order) in enumerate(wanted.items()):
            if re.fullmatch(pattern, name):
                matrix = found[f"{name}.online_{number}_input.weight"].float() / order**0.5
                module.register_forward_pre_hook(lambda _, given, matrix=matrix: (rotate(given[0], matrix), *given[1:]))
    return model


def rotate(x, matrix):
    return (x.float().unflatten(-1, (-1, len(matrix))) @ matrix.to(x.device)).flatten(-2).to(x.dtype)
'''


class Rotations:
    """Online rotations of the linears of an export, collected layer by layer; matrices in ``dtype``."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.found: dict[str, int] = {}  # pattern of linears -> order of the matrix

    def tensors(self, linear: PackedLinear, operations: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Matrix of the rotation of the input of ``linear``, by name; none without a rotation."""
        if not operations:
            return {}
        order = operations[0].get("size", linear.shape[1])
        pattern = ".*" + re.escape(f".{linear.name.split('.', 3)[3]}")
        number = list(self.found).index(pattern) if pattern in self.found else len(self.found)
        self.found[pattern] = order
        matrix = (apply_hadamard(torch.eye(order, dtype=torch.float64)) * order**0.5).round()
        return {f"{linear.name}.online_{number}_input.weight": matrix.to(self.dtype)}

    def transform_config(self) -> dict[str, Any]:
        """``transform_config`` of quantization_config; empty without rotations."""
        if not self.found:
            return {}
        groups = {
            f"online_{number}": {
                "type": "hadamard" if order & (order - 1) == 0 else "random-hadamard",
                "apply": [{"targets": [f"re:{pattern}$"], "location": "input", "inverse": False, "ignore": []}],
                "head_dim": order,
                "randomize": False,
                "requires_grad": False,
            }
            for number, (pattern, order) in enumerate(self.found.items())
        }
        return {"transform_config": {"config_groups": groups}}

    def marker(self) -> dict[str, Any]:
        """Entry of config.json that {folder}/load.py and the check of the export read; empty without rotations."""
        return {MARKER: dict(self.found)} if self.found else {}

    def files(self) -> dict[str, str]:
        """``{folder}/load.py`` by name; empty without rotations."""
        return {"load.py": LOADER} if self.found else {}
