"""Placement of the layers of a job: their device, the dtype of factorizations, and what fits at a time.

Layers are read, folded, solved and measured on one device, one group of them at a time; results
return to the CPU. Random numbers are drawn on the CPU from their seeds, so they are the same on every
device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .chunks import WORKING
from .malloc import LARGE

# Compute capabilities of GPUs that compute float64 at half the rate of float32 (P100, V100, A100, H100,
# B200). All others take 32 or 64 times as long (CUDA C++ Programming Guide, arithmetic instructions).
FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """``device`` of the tensors of a layer, and ``solver_dtype`` of the factorizations on it."""

    device: torch.device = CPU
    solver_dtype: torch.dtype = torch.float64

    def to_dict(self) -> dict[str, str]:
        """Type of the device and name of the dtype, for the record of a result."""
        return {"device": self.device.type, "solver_dtype": str(self.solver_dtype).removeprefix("torch.")}

    def budget(self) -> int:
        """Bytes of weights and second moments that are solved together: what fits into the free memory of
        a GPU, at most :data:`.malloc.LARGE`."""
        if self.device.type != "cuda":
            return LARGE
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(LARGE, int(free / WORKING))


def solver_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of ``compute.solver_dtype`` in the config; ``auto`` is float64 unless ``device`` is slow at it."""
    if name != "auto":
        return getattr(torch, name)
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    return torch.float32 if slow else torch.float64


def in_smaller_parts(parts: list[range], run: Callable[[range], None]) -> list[range]:
    """Call ``run`` for each of ``parts``; where the GPU has too little memory, for its halves in turn.

    Returns the parts that fitted. Raises the error of torch if a part of one item does not fit.
    """
    fitted, pending = [], list(parts)
    while pending:
        part = pending.pop(0)
        try:
            run(part)
        except torch.OutOfMemoryError:
            if len(part) <= 1:
                raise
            print(f"too little GPU memory for {len(part)} at a time; tried again by halves", file=sys.stderr)
        else:
            fitted.append(part)
            continue
        # outside of the handler, whose traceback holds tensors
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        middle = part.start + len(part) // 2
        pending[:0] = [range(part.start, middle), range(middle, part.stop)]
    return fitted
