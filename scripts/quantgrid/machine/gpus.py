"""GPU assignment: a job takes the first GPU that no other job of this user holds.

If a scheduler has set ``CUDA_VISIBLE_DEVICES`` its choice stands.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import tempfile
import time
from glob import glob
from pathlib import Path
from typing import TextIO

DEVICES = "/dev/nvidia[0-9]*"
_DRIVER, _NOT_INITIALIZED = "libcuda.so.1", 3  # of CUDA; CUDA_ERROR_NOT_INITIALIZED
_HELD: dict[int, TextIO] = {}  # GPU -> open file, whose lock ends with the process


def take(count: int, seconds: float = 1.0, folder: str | None = None) -> int:
    """Lock one of ``count`` GPUs until the process ends; return its number.

    Polls every ``seconds`` until one is free.
    """
    if _HELD:
        return next(iter(_HELD))
    place = Path(folder or tempfile.gettempdir())
    while True:
        for number in range(count):
            file = open(place / f"quantgrid-{os.getuid()}-card-{number}.lock", "w")  # noqa: SIM115 (held until the process ends)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _HELD[number] = file
            return number
        time.sleep(seconds)


def choose(devices: str = DEVICES) -> None:
    """Restrict this process to one free GPU; call it before CUDA is initialized.

    No effect without GPUs, or if ``CUDA_VISIBLE_DEVICES`` is set.
    """
    count = len(glob(devices))
    if count and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(take(count))


def driver_initialized() -> bool:
    """Check whether this process has initialized CUDA; its forks could not use a GPU then."""
    try:
        driver = ctypes.CDLL(_DRIVER, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:  # not loaded
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED


def card_memory() -> int | None:
    """Bytes of the smallest GPU that nvidia-smi lists; None without it."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes) << 20 if sizes else None
