"""A grid of cells against llm-compressor, one cell after another: ``python
tests/benchmarks/grid.py`` (``make bench BENCH=grid``).

Weights of SmolLM2-135M in INT4, groups of 64, under three transforms (none, SmoothQuant, rotations)
and four mitigations, in float32 on two cores:

- ``quantgrid, twelve cells``: the workflow from nothing but model and windows to results.csv, jobs
  of one thread, two side by side, but for calibration and full precision, which all of them wait
  for; in two runs, to the twelve checkpoints (calibration and transforms included) and from there
  to results.csv, so that the quantizations are timed separately;
- ``quantgrid, six cells``: the same without low rank, which llm-compressor does not have;
- ``llm-compressor, six cells``: a process of two threads for each, one after another, from the
  model's folder to its losses (``grid_cell.py``, in the peers' environment);
- ``llm-compressor, twelve cells``: the same six counted twice, as if it had low-rank terms that
  take no time: less than any twelve cells would take.

Both sides get the model fetched and the corpora tokenized, and evaluate with the same code. Ours
writes packed checkpoints and results, theirs writes nothing but losses, and gets the hidden states
of full precision from our run, which counts them among its evaluations. ``evaluations alone`` is
the bound: what is left of our side where quantizations take no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from prepared import make, workflow  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import run  # noqa: E402

from quantgrid.config import validation as configs  # noqa: E402
from quantgrid.ground.storage import read_json  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402

BENCHMARK, HERE, DAMPING = "grid", Path(__file__).parent, 0.01
TRANSFORMS = {
    "none": {"method": "none"},
    "smoothquant": {"method": "scaling", "alpha": 0.5},
    "hadamard": {"method": "random_hadamard", "seed": 0},
}
# mitigations that both sides have
SHARED = {"rtn": {"method": "rtn"}, "gptq": {"method": "gptq", "damping": DAMPING}}
ALONE = {"low-rank": {"method": "low_rank", "rank": 8}, "gptq-low-rank": {"method": "gptq_low_rank", "rank": 8}}
SIX, TWELVE = "quantgrid, six cells", "quantgrid, twelve cells"
GRIDS = {SIX: SHARED, TWELVE: {**SHARED, **ALONE}}
PEER, PEER_TWICE = "llm-compressor, six cells", "llm-compressor, twelve cells"
QUANTIZATIONS, EVALUATIONS = ", quantizations alone", ", evaluations alone"
# (case, reference, highest ratio that is the goal)
WANTED = (
    (TWELVE, PEER_TWICE, 1 / 2),
    (TWELVE + QUANTIZATIONS, PEER_TWICE + QUANTIZATIONS, 1 / 5),
    (TWELVE + EVALUATIONS, PEER_TWICE, None),
    (SIX, PEER, 1 / 2),
    (SIX + QUANTIZATIONS, PEER + QUANTIZATIONS, 1 / 5),
    (SIX + EVALUATIONS, PEER, None),
)


@dataclass(frozen=True)
class Measured:
    """One turn of one side: seconds to the quantized models, seconds to evaluate them, peak MB of
    its largest process, losses by cell."""

    quantization: float
    evaluation: float
    peak_mb: float
    losses: dict[str, float]


def config_of(options: argparse.Namespace, mitigations: dict[str, Any], results: Path) -> dict[str, Any]:
    """The config that is named, with one study: one model under all transforms with
    ``mitigations``, weights alone, float32 on the CPU."""
    content = configs.read(options.config)
    corpora = [content["calibrations"]["default"]["corpus"], options.corpus]
    study = {
        "models": [options.model or next(iter(content["models"]))],
        "transforms": list(TRANSFORMS),
        "mitigations": list(mitigations),
        "granularities": [f"group-{options.group_size}"],
        "formats": ["w4a16"],
    }
    return {
        **content,
        "corpora": {name: content["corpora"][name] for name in corpora},
        "results_dir": str(results),
        "threads": {"default": 1, "calibrate_model": options.threads, "evaluate_reference": options.threads},
        "compute": {"device": "cpu", "dtype": "float32"},
        "keep_checkpoints": True,
        "transforms": TRANSFORMS,
        "mitigations": mitigations,
        "evaluate": {"perplexity": [options.corpus]},
        "studies": {"grid": study},
    }


def paths_of(plan: Plan, corpus: str) -> dict[str, str]:
    """Inputs of both sides: the model's folder, the windows of calibration and of evaluation, the
    hidden states of full precision."""
    model = plan.cells[0].model
    calibrate = plan.calibrate_model(model, "default")
    [shard] = plan.shards(corpus)
    reference = plan.evaluate_reference(model, corpus, shard)
    return {
        "model": calibrate.inputs["model"],
        "windows": calibrate.inputs["windows"],
        "evaluation": reference.inputs["windows"],
        "reference": reference.outputs["reference"],
    }


def own(options: argparse.Namespace, name: str, scratch: Path) -> tuple[Measured, dict[str, str]]:
    """quantgrid's side from nothing, in a new folder of ``scratch``: the seconds, and the inputs
    of the other side."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    content = config_of(options, GRIDS[name], folder / "results")
    plan = Plan(configs.check(content))
    shared, cells = paths_of(plan, options.corpus), [cell for cell in plan.cells if cell.quantized]
    make(content, folder, [shared[name] for name in ("model", "windows", "evaluation")], options.threads)
    checkpoints = [plan.quantize_model(cell).outputs["checkpoint"] for cell in cells]
    targets = checkpoints, [f"{plan.results}/results.csv"]
    parts = [run(workflow(content, folder, options.threads, *wanted), 1, scratch / "log") for wanted in targets]
    losses = {}
    for cell in cells:
        found = read_json(plan.merge_shards(cell, options.corpus).outputs["result"])
        losses[f"{cell.transform} {cell.mitigation}"] = statistics.mean(found["windows"]["negative_log_likelihood"])
    return Measured(parts[0].seconds, parts[1].seconds, max(part.peak_mb for part in parts), losses), shared


def peer(options: argparse.Namespace, shared: dict[str, str], log: Path) -> Measured:
    """llm-compressor's side: one process after another."""
    batch = configs.read(options.config)["evaluation"]["batch_size"]
    settings = {
        **shared,
        "batch": batch,
        "group-size": options.group_size,
        "damping": DAMPING,
        "threads": options.threads,
    }
    parts, losses = [], {}
    for transform in TRANSFORMS:
        for mitigation in SHARED:
            method = {**settings, "transform": transform, "mitigation": mitigation}
            command = [
                options.peers,
                str(HERE / "grid_cell.py"),
                *(word for name, value in method.items() for word in (f"--{name}", str(value))),
            ]
            parts.append(run(command, options.threads, log))
            losses[f"{transform} {mitigation}"] = json.loads(parts[-1].output.splitlines()[-1])
    evaluation = sum(found["evaluation"] for found in losses.values())
    return Measured(
        sum(part.seconds for part in parts) - evaluation,
        evaluation,
        max(part.peak_mb for part in parts),
        {cell: found["loss"] for cell, found in losses.items()},
    )


def take_turns(options: argparse.Namespace, scratch: Path) -> dict[str, list[Measured]]:
    """All turns of every side; of llm-compressor the first ``peer_repeats`` alone. Progress to
    standard error."""
    taken: dict[str, list[Measured]] = {name: [] for name in (*GRIDS, PEER)}
    for turn in range(max(options.repeats, options.peer_repeats)):
        for name in GRIDS:
            found, shared = own(options, name, scratch)
            taken[name].append(found)
        if turn < options.peer_repeats:
            taken[PEER].append(peer(options, shared, scratch / "log"))
        for name, turns in taken.items():
            print(
                f"turn {turn + 1}, {name}: {turns[-1].quantization:.1f} s and {turns[-1].evaluation:.1f} s",
                file=sys.stderr,
            )
    return taken


def rows_of(taken: dict[str, list[Measured]], options: argparse.Namespace) -> list[dict[str, object]]:
    milliseconds, about = {}, {}
    for name, turns in taken.items():
        quantization, evaluation = (
            1e3 * statistics.median(getattr(turn, part) for turn in turns) for part in ("quantization", "evaluation")
        )
        found = {name: quantization + evaluation, name + QUANTIZATIONS: quantization, name + EVALUATIONS: evaluation}
        milliseconds |= found
        about |= {key: (f"{statistics.median(turn.peak_mb for turn in turns):.0f}", len(turns)) for key in found}
    for part in ("", QUANTIZATIONS):
        milliseconds[PEER_TWICE + part], about[PEER_TWICE + part] = 2 * milliseconds[PEER + part], about[PEER + part]
    return [
        timed_row(
            BENCHMARK,
            case,
            options.threads,
            reference,
            milliseconds,
            goal,
            peak_mb=about[case][0],
            reference_peak_mb=about[reference][0],
            repeats=f"{about[case][1]} / {about[reference][1]}",
        )
        for case, reference, goal in WANTED
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument(
        "--config", default="config/config.yaml", help="where model, corpora and calibration are defined"
    )
    parser.add_argument("--model", help="name of a model there; by default the first")
    parser.add_argument("--corpus", default="library-docs", help="name of the corpus there to evaluate on")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="cores of the workflow, threads of llm-compressor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=1, help="of llm-compressor, which takes longest")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers/bin/python"),
        help="the Python of llm-compressor (make .venv-peers/.installed)",
    )
    options = parser.parse_args()
    if not Path(options.peers).is_file():
        parser.error(f"{options.peers} is not there: `make .venv-peers/.installed` makes it")
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as folder:
        run(
            [options.peers, str(HERE / "grid_cell.py"), "--help"], options.threads, Path(folder) / "log"
        )  # its files come from the disk once
        taken = take_turns(options, Path(folder))
    rows = rows_of(taken, options)
    for row in rows:
        show(row)
    for cell, loss in taken[TWELVE][-1].losses.items():
        theirs = f", llm-compressor {taken[PEER][-1].losses[cell]:.3f}" if cell in taken[PEER][-1].losses else ""
        print(f"{cell}: loss {loss:.3f} nats a token{theirs}")
    record(BENCHMARK, rows, options.results)


if __name__ == "__main__":
    main()
