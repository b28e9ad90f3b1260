"""Random inputs of jobs: models of any size without download or training.

python tests/benchmarks/random_models.py --folder F --hidden 512 --layers 2 --windows 4     # a
separate process keeps the caller small
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

WINDOW, HEAD, VOCABULARY = 512, 64, 512  # tokens of a window, channels of a head, tokens there are


@dataclass(frozen=True)
class Size:
    """A Llama of ``hidden`` channels (a multiple of 64, three times as many inside its MLPs) and
    ``layers`` layers, and ``windows`` windows of ``WINDOW`` tokens that it runs on."""

    hidden: int
    layers: int
    windows: int

    @property
    def tokens(self) -> int:
        return self.windows * WINDOW

    def options(self) -> list[str]:
        """Command-line options of :func:`main` for this size."""
        return ["--hidden", str(self.hidden), "--layers", str(self.layers), "--windows", str(self.windows)]


def write_inputs(folder: Path, size: Size) -> None:
    """Into ``folder`` in float32: ``model``, the canonical folder of a Llama, ``windows``, the
    parameters ``transform`` of the transform ``none``, and as ``reference`` final hidden states
    (windows, WINDOW, hidden), which are not those of the model."""
    import torch

    from quantgrid.corpora import token_windows
    from quantgrid.ground.storage import write_json, write_tensors
    from quantgrid.inference.transform import Transform
    from tiny_decoders import Case, random_tokens, save

    heads = size.hidden // HEAD
    config, state = Case(
        "LlamaForCausalLM", size.hidden, 3 * size.hidden, size.layers, heads, heads, HEAD, VOCABULARY
    ).build(torch.float32)
    save(folder / "model", config, state)
    write_json(folder / "model" / "provenance.json", {"weights_sha256": {}})
    token_windows.save(folder / "windows", random_tokens(config, size.windows, WINDOW), {})
    Transform([]).save(folder / "transform")
    write_tensors(folder / "reference", {"hidden": torch.randn(size.windows, WINDOW, size.hidden)})


def write_statistics(model: object, windows: object, path: Path, samples: int = 64) -> None:
    """The statistics of a transformers decoder over ``windows`` (count, tokens), as the job
    calibrate_model leaves them at ``path``."""
    from quantgrid.calibration.collect import collect
    from quantgrid.calibration.statistics import to_tensors
    from quantgrid.ground.storage import write_tensors

    found = collect(model, windows, samples=samples)
    write_tensors(
        path, {name: tensor for site, kept in found.items() for name, tensor in to_tensors(site, kept).items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("hidden", "layers", "windows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    write_inputs(options.folder, Size(options.hidden, options.layers, options.windows))


if __name__ == "__main__":
    main()
