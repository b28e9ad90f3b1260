"""Speed of training the reference models, products in bfloat16 and in float32: ``python
tests/benchmarks/reference_training.py``.

Forward and backward of one batch of each recipe (4 windows of 512 random tokens) take turns;
printed are tokens per second of CPU time, medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402

from quantgrid.reference.family import FAMILY, Reference  # noqa: E402
from quantgrid.reference.text import VOCABULARY  # noqa: E402
from quantgrid.reference.training import loss_of, new_model  # noqa: E402


def tokens_per_second(reference: Reference, repeats: int) -> dict[str, float]:
    """By the type of the products."""
    model, training = new_model(reference), reference.training
    batch = torch.randint(VOCABULARY, (training.batch, training.window))
    seconds: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for _ in range(repeats + 1):
        for name, taken in seconds.items():
            begun = time.process_time()
            loss_of(model, batch, name == "bfloat16", training.balance)[1].backward()
            taken.append(time.process_time() - begun)
    return {name: training.tokens_per_step / median(taken[1:]) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, reference in FAMILY.items():
        speeds = tokens_per_second(reference, options.repeats)
        print(
            f"{name:20} bfloat16 {speeds['bfloat16']:6.0f}, float32 {speeds['float32']:6.0f} tokens a second, ratio "
            f"{speeds['bfloat16'] / speeds['float32']:.2f}"
        )


if __name__ == "__main__":
    main()
