"""Low-rank terms of a cell as an adapter folder that PEFT loads over the exported weights.

y = x W^T + (x right^T) left^T is an adapter with ``lora_A`` = right, ``lora_B`` = left and a factor of
lora_alpha / r = 1. Factors stay in float32.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ground.storage import write_json
from ..ground.tensor_files import TensorSpool, write_each
from .packed_cell import ExportLayer

FOLDER = "adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Adapter:
    """Low-rank terms of the layers, collected in files of ``folder`` until :meth:`write`."""

    def __init__(self, folder: Path):
        self.spool = TensorSpool(folder)
        self.ranks: dict[str, int] = {}

    def add(self, layer: ExportLayer) -> None:
        """Add the low-rank terms of a layer."""
        for linear in layer.joined:
            if linear.low_rank is not None:
                left, right = linear.low_rank
                self.ranks[linear.name] = len(right)
                self.spool.update(_named(linear.name, left, right))

    def config(self, base: str) -> dict[str, Any]:
        """adapter_config.json over the folder or repository ``base``."""
        common = Counter(self.ranks.values()).most_common(1)[0][0]
        other = {re.escape(name): rank for name, rank in self.ranks.items() if rank != common}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": common,
            "lora_alpha": common,
            "rank_pattern": other,
            "alpha_pattern": other,
            "target_modules": sorted(self.ranks),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }

    def write(self, folder: Path, base: str) -> None:
        """Write the adapter into ``folder``."""
        folder.mkdir()
        write_each(folder / WEIGHTS, self.spool, {}, format="pt")
        write_json(folder / CONFIG, self.config(base))


def _named(linear: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    return {
        f"base_model.model.{linear}.lora_A.weight": right.contiguous(),
        f"base_model.model.{linear}.lora_B.weight": left.contiguous(),
    }
