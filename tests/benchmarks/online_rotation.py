"""Cost of the online Hadamard transform: ``python tests/benchmarks/online_rotation.py`` (``make
bench BENCH=online_rotation``).

``apply_hadamard`` of the 1536 channels of SmolLM2's down projection against that projection itself,
1536 to 576, on 1024 tokens in float32, in turns. The goal: the transform costs less than the matrix
product that follows it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import medians  # noqa: E402

from quantgrid.linalg.hadamard import apply_hadamard  # noqa: E402

BENCHMARK = "online_rotation"


def measure(tokens: int, channels: int, outputs: int, threads: int, repeats: int) -> dict[str, object]:
    """The row of one thread count."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, channels, generator=generator) for rows in (tokens, outputs))
    case, reference = f"Hadamard of {channels}, {tokens} tokens", f"linear {channels} to {outputs}"
    with torch.inference_mode():
        found = medians(
            {case: lambda: apply_hadamard(x), reference: lambda: torch.nn.functional.linear(x, weight)}, repeats
        )
    return timed_row(BENCHMARK, case, threads, reference, found, 1.0, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    rows = [
        measure(options.tokens, 1536, 576, threads, options.repeats)
        for threads in sorted({1, len(os.sched_getaffinity(0))})
    ]
    for row in rows:
        show(row)
    record(BENCHMARK, rows, options.results)


if __name__ == "__main__":
    main()
