"""The device that a benchmark runs on: what tables call it, and a clock that waits until it is
done."""

from __future__ import annotations

import time

import torch


def name_of(device: torch.device) -> str:
    """``cpu``, or what a GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def now(device: torch.device) -> float:
    """Seconds, once everything that was started on ``device`` has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
