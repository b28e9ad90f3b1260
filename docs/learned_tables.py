"""Tables of docs/reference/learning.md from the results folder of `make run CONFIG=config/learned.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

MODELS = (
    "smollm2-135m",
    "reference-12m",
    "reference-4m",
    "reference-4m-planted",
    "reference-1m",
    "reference-1m-planted",
)
LEARNED = ("hadamard-seeds-s1", "hadamard-seeds-s2", "optimized-rotation", "optimized-rotation-scaling", "flatquant")
GRADIENTS = ("rotation-identity", "rotation-range", "flatquant-identity", "flatquant-range", "flatquant-clipped")
HEADS = {
    "hadamard-seeds-s1": "seed 1",
    "hadamard-seeds-s2": "seed 2",
    "optimized-rotation": "rotation",
    "optimized-rotation-scaling": "rotation, scaling",
    "flatquant": "FlatQuant",
    "rotation-identity": "rotation, identity",
    "rotation-range": "rotation, range",
    "flatquant-identity": "FlatQuant, identity",
    "flatquant-range": "FlatQuant, range",
    "flatquant-clipped": "FlatQuant, range, inputs clipped",
}


def differences(folder: Path, study: str, transforms: tuple[str, ...]) -> str:
    """Markdown: paired differences of the divergence to the random rotation, a row per model and mitigation.

    Bold where the study's test finds a difference (Holm-adjusted over all of its comparisons).
    """
    found = pd.read_csv(folder / "comparisons" / f"{study}.csv")
    found = found[found.metric == "kl_divergence"].set_index(["model", "format", "mitigation", "transform"])
    cells = pd.read_csv(folder / "results.csv")
    base = cells[(cells.metric == "kl_divergence") & (cells["transform"] == "hadamard")]
    base = base.drop_duplicates(["model", "format", "mitigation"]).set_index(["model", "format", "mitigation"])
    lines = [
        f"| | random, seed 0 | {' | '.join(HEADS[name] for name in transforms)} |",
        f"| :-- | {' | '.join('--:' for _ in range(len(transforms) + 1))} |",
    ]
    rows = sorted({key[:3] for key in found.index}, key=lambda key: (MODELS.index(key[0]), key[1], key[2] == "gptq"))
    for row in rows:
        model, scheme, mitigation = row
        name = f"{model}, {mitigation.upper() if scheme == 'int4' else scheme.upper()}"
        entries = [
            _entry(found.loc[(*row, transform)]) if (*row, transform) in found.index else "" for transform in transforms
        ]
        lines.append(f"| {name} | {base.loc[row].value:.4f} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _entry(cell: pd.Series) -> str:
    shown = f"{cell.effect:+.4f} ± {cell.stderr:.4f}".replace("-", "−")
    mark = "‡" if isinstance(cell.start_kept, str) or cell.start_kept is True else ""
    return f"**{shown}**{mark}" if cell.differs else f"{shown}{mark}"


if __name__ == "__main__":
    results = Path(sys.argv[1])
    print(differences(results, "learned", LEARNED), end="\n\n")
    print(differences(results, "gradients", GRADIENTS))
