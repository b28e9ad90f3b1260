"""Time of a low-rank term for one large layer: ``python tests/benchmarks/low_rank.py --fraction 8``
measures 28672 x 8192 at an eighth of each side.

The error is that of INT4 in groups of 128 on Gaussian weights with a few strong directions. Exact
(a Gram matrix and its leading eigenvectors) and random (block Krylov) singular vectors take turns;
printed are seconds of CPU time, the relative difference of the singular value number rank, and the
times at full size by the count of operations: cubic in the side for the exact way, quadratic for
the random one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402

from quantgrid.mitigations.solvers import singular  # noqa: E402
from quantgrid.quantizer import fake_quantize  # noqa: E402
from quantgrid.schemes import scheme  # noqa: E402


def error_matrix(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) float64: what rounding leaves, and 16 directions that stand out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    error = (weight - fake_quantize(weight, scheme("int4", group_size=128))).double()
    strong = torch.randn(rows, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    return error + 0.05 * error.std() * strong.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=int, default=8, help="sides are 28672 and 8192 over this")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    error = error_matrix(28672 // options.fraction, 8192 // options.fraction)
    seconds, values, blocks = {}, {}, 0
    for name in ("exact", "random"):
        begun = time.process_time()
        if name == "exact":
            vectors = (
                singular.leading_directions(error, options.rank) if min(error.shape) <= singular.EXACT_UP_TO else None
            )
        else:
            vectors, blocks = singular.krylov_directions(error, options.rank)
        if vectors is not None:
            seconds[name] = time.process_time() - begun
            values[name] = torch.linalg.svdvals(vectors.mT @ error)[-1].item()
    print(f"{tuple(error.shape)}, rank {options.rank}, {options.threads} threads")
    for name, taken in seconds.items():
        full = taken * options.fraction ** (3 if name == "exact" else 2)
        print(
            f"{name:7} {taken:8.2f} s, at 28672 x 8192 about {full:8.0f} s"
            + (f" ({blocks} blocks)" if name == "random" else "")
        )
    if len(values) == 2:
        print(
            f"singular value number {options.rank}: relative difference "
            f"{abs(values['random'] / values['exact'] - 1):.1e}"
        )


if __name__ == "__main__":
    main()
