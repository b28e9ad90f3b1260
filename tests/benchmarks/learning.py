"""Time of a training step of the transforms that are learned end to end: ``python
tests/benchmarks/learning.py`` (``make bench BENCH=learning``).

SmolLM2-135M, INT4 activations, 4 windows of 256 tokens. The case maps the inputs of the sites
around their rounding and takes all windows at once; the reference folds the transform into the
weights anew for every window and computes every layer again on the way back. Both take turns in one
process; seconds go to the goals of 4 and 6 on 2 threads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from prepared import make  # noqa: E402
from records import record, row, show, timed_row  # noqa: E402
from turns import medians  # noqa: E402

from quantgrid.calibration.layers import DecoderFolder  # noqa: E402
from quantgrid.config import registry, validation  # noqa: E402
from quantgrid.corpora import token_windows  # noqa: E402
from quantgrid.inference.transform import fit  # noqa: E402
from quantgrid.learning import objectives  # noqa: E402
from quantgrid.learning.network import Network  # noqa: E402
from quantgrid.learning.trainables import Trainables, learned_kinds  # noqa: E402
from quantgrid.learning.training import descend  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.schemes.cell_schemes import CellSchemes  # noqa: E402
from quantgrid.schemes.granularities import cell_schemes  # noqa: E402

BENCHMARK, REFERENCE = "learning", "weights folded for every window"
GOALS = {"optimized_rotation": 4.0, "optimized_rotation_scaling": 6.0}  # seconds
WINDOWS, HELD_OUT = 4, 16


def inputs(config: str, threads: int, scratch: Path) -> tuple[str, str]:
    """Model folder and windows of the study of learned transforms, made by the workflow."""
    content = {**validation.read(config), "threads": threads}
    plan = Plan(validation.check(content))
    step = plan.tokenize_corpus("smollm2-135m", "library-docs-training")
    make(content, scratch, step.outputs.values(), threads)
    return step.inputs["model"], step.outputs["windows"]


def step_of(method: str, model: str, windows: torch.Tensor, mapped: bool) -> Callable[[], float]:
    """One gradient of ``method``'s objective on the first windows, as its training takes it."""
    module = registry.load("transforms", method)
    options = registry.method("transforms", method).resolve({"method": method, "loss": "kl_top"}, method)["options"]
    start = fit(module.primitives(seed=0, **options), DecoderFolder(model), None)
    schemes = CellSchemes.from_dict(cell_schemes({"preset": "int4"}, "channel", BENCHMARK, 64))
    network = Network(model, start, schemes, False, windows)
    network.mapped = mapped
    objective, trainables = (
        objectives.EndToEnd(network, HELD_OUT, "kl_top"),
        Trainables(start.parameters, learned_kinds(start)),
    )

    def step() -> float:
        objectives.PIECE = 1024 if mapped else windows.shape[1]
        return descend(trainables, objective, list(range(WINDOWS)))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of benchmarks.csv and .md")
    parser.add_argument("--config", default="config/learned.yaml", help="where model and corpora are defined")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as folder:
        model, windows = inputs(options.config, options.threads, Path(folder))
    tokens = token_windows.load(windows)[0][: WINDOWS + HELD_OUT]
    rows = []
    for method, goal in GOALS.items():
        taken = medians(
            {method: step_of(method, model, tokens, True), REFERENCE: step_of(method, model, tokens, False)},
            options.repeats,
        )
        rows.append(timed_row(BENCHMARK, method, options.threads, REFERENCE, taken, None, repeats=options.repeats))
        rows.append(
            row(
                BENCHMARK,
                method,
                options.threads,
                f"{goal:g} s",
                taken[method] / (1e3 * goal),
                1.0,
                milliseconds=f"{taken[method]:.4g}",
                reference_milliseconds=f"{1e3 * goal:.4g}",
                repeats=options.repeats,
            )
        )
    for found in rows:
        show(found)
    record(BENCHMARK, rows, ROOT / options.results)


if __name__ == "__main__":
    main()
