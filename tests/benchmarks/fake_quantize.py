"""Speed of fake quantization: ``python tests/benchmarks/fake_quantize.py`` (``make bench``)
measures, prints and records ratios.

A 4096 x 4096 bfloat16 activation, against one elementwise pass (``x * 1.0001``) and against
compressed-tensors' own fake quantization where that is installed. All contenders of a thread count
take turns; a ratio is that of two medians. Allocating the 32 MB result is part of every contender:
page faults are most of what the elementwise pass takes. ``THP_MEM_ALLOC_ENABLE=1`` in the
environment lets torch ask for huge pages, which makes every contender faster and the ratios larger.

NVFP4 weights and activations of four shapes under the ranges four_six and exhaustive, against minmax.
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776`` measures as jobs run (``KEEP_FREED`` of
``quantgrid.machine.malloc``); without them page faults of temporary tensors count too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import medians  # noqa: E402

from quantgrid.quantizer import fake_quantize  # noqa: E402
from quantgrid.schemes import activation_scheme, scheme  # noqa: E402

PASS, TOOLKIT = "x * 1.0001", "compressed-tensors int4 per token"
# Case -> (preset, highest ratio to one elementwise pass that is the goal).
CASES = {"int4 per token": ("int4", 3.5), "nvfp4": ("nvfp4", 9.0), "mxfp4": ("mxfp4", None)}
# Range -> highest ratio to ``minmax`` that is the goal, on one thread.
RANGES = {"minmax": None, "four_six": 2.5, "exhaustive": None}
RANGED = {"weights": scheme, "activations": activation_scheme}
SHAPES = ((8, 576), (256, 576), (256, 1536), (512, 4096))


def toolkit(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """compressed-tensors' dynamic asymmetric INT4 per token, as its forward pass calls it; None
    where it is not installed."""
    try:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization import fake_quantize as theirs
        from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
    except ImportError:
        return None
    arguments, batch = (
        QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="token", dynamic=True),
        x[None],
    )
    return lambda: theirs(batch, *compute_dynamic_scales_and_zp(batch, arguments, None), arguments)


def contenders(x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    found: dict[str, Callable[[], torch.Tensor]] = {PASS: lambda: x * 1.0001}
    found |= {name: partial(fake_quantize, x, activation_scheme(preset)) for name, (preset, _) in CASES.items()}
    theirs = toolkit(x)
    return found if theirs is None else {**found, TOOLKIT: theirs}


def rows_of(found: dict[str, float], threads: int, repeats: int) -> list[dict[str, object]]:
    """One row per case and reference; a goal for the toolkit is the lowest speed-up, written as the
    highest ratio 1/2."""
    wanted = [(name, PASS, goal) for name, (_, goal) in CASES.items()] + [("int4 per token", TOOLKIT, 0.5)]
    return [
        timed_row("fake_quantize", case, threads, reference, found, goal, repeats=repeats)
        for case, reference, goal in wanted
        if case in found and reference in found
    ]


def range_rows(shape: tuple[int, int], role: str, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """Rows of the ranges of NVFP4 against ``minmax``, for the scheme of ``role`` and a tensor of ``shape``, in
    processor time of this thread."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    of = f"{role} {shape[0]} x {shape[1]} {str(dtype).removeprefix('torch.')}"
    calls = {f"nvfp4 {name}, {of}": partial(fake_quantize, x, RANGED[role]("nvfp4", range=name)) for name in RANGES}
    reference, *others = calls
    found, threads = medians(calls, repeats, time.thread_time), torch.get_num_threads()
    return [
        timed_row("fake_quantize", case, threads, reference, found, goal, repeats=repeats)
        for case, goal in zip(others, [*RANGES.values()][1:])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    x = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        rows += rows_of(medians(contenders(x), options.repeats), threads, options.repeats)
    torch.set_num_threads(1)
    for shape, role, dtype in itertools.product(SHAPES, RANGED, (torch.float32, torch.bfloat16)):
        rows += range_rows(shape, role, dtype, options.repeats)
    for row in rows:
        show(row)
    record("fake_quantize", rows, options.results)


if __name__ == "__main__":
    main()
