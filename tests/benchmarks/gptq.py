"""GPTQ of a whole model against llm-compressor and GPTQModel: ``python tests/benchmarks/gptq.py``
(``make bench BENCH=gptq``).

INT4 weights in groups of 64, every linear of SmolLM2-135M, the calibration windows of
config/config.yaml, float32, two threads on either side. Model, windows and statistics come from the
workflow's own steps. Each contender is a fresh process, imports included, all of them in turns:

- ``quantgrid, cached statistics``: the job ``quantize_model``, from the statistics on disk to the
  packed checkpoint and the errors of its layers;
- ``quantgrid, with calibration``: the job ``calibrate_model``, then that one;
- ``llm-compressor oneshot``: from the model's folder to its packed checkpoint (``gptq_oneshot.py``,
  in the peers' environment);
- ``GPTQModel``: the same by GPTQModel on the CPU (``gptq_gptqmodel.py``, in an environment of its
  own);
- the two ``solver alone``: ``gptq_solvers.py``; seconds inside the solver, summed over all linears.

Both peers quantize each layer for inputs that come through quantized layers, quantgrid from cached
statistics does not: that is what ``propagation: sequential`` is for, and not what is timed here.
Only the solvers get the same inputs; their errors are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from prepared import job, make  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import Process, run  # noqa: E402

from quantgrid.config import validation as configs  # noqa: E402
from quantgrid.jobs.integrity import origin_of  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.plan.steps import Step  # noqa: E402

BENCHMARK, HERE, DAMPING = "gptq", Path(__file__).parent, 0.01
CACHED, CALIBRATED = "quantgrid, cached statistics", "quantgrid, with calibration"
ONESHOT, GPTQMODEL = "llm-compressor oneshot", "GPTQModel"
OWN_SOLVER, PEER_SOLVER = "quantgrid solver alone", "llm-compressor solver alone"
# (case, reference, highest ratio that is the goal)
WANTED = (
    *((case, peer, goal) for peer in (ONESHOT, GPTQMODEL) for case, goal in ((CACHED, 1 / 5), (CALIBRATED, 2 / 3))),
    (CACHED, PEER_SOLVER, 1 / 2),
    (OWN_SOLVER, PEER_SOLVER, 1 / 2),
)


@dataclass(frozen=True)
class Prepared:
    """The steps that are timed; what they read is there."""

    quantize: Step
    calibrate: Step

    @property
    def group_size(self) -> int:
        return self.quantize.spec["schemes"]["weight"]["group_size"]


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """The config that is named, with one study: GPTQ of one model, weights alone, float32 on the
    CPU."""
    content = configs.read(options.config)
    model = options.model or next(iter(content["models"]))
    study = {
        "models": [model],
        "transforms": ["none"],
        "mitigations": ["gptq"],
        "granularities": [f"group-{options.group_size}"],
        "formats": ["w4a16"],
    }
    return {
        **content,
        "results_dir": str(options.results),
        "threads": options.threads,
        "compute": {"device": "cpu", "dtype": "float32"},
        "transforms": {"none": {"method": "none"}},
        "mitigations": {"gptq": {"method": "gptq", "damping": DAMPING}},
        "studies": {"gptq": study},
    }


def prepare(options: argparse.Namespace, scratch: Path) -> Prepared:
    """Let the workflow make model, windows, statistics and the parameters of the transform
    ``none``, where they are not there yet."""
    content = config_of(options)
    plan = Plan(configs.check(content))
    # the other cell is the full-precision baseline
    cell = next(cell for cell in plan.cells if cell.mitigation == "gptq")
    found = Prepared(plan.quantize_model(cell), plan.calibrate_model(cell.model, "default"))
    make(content, scratch, [*found.quantize.inputs.values(), *found.calibrate.inputs.values()], options.threads)
    return found


def contenders(
    prepared: Prepared, options: argparse.Namespace, scratch: Path
) -> dict[str, Callable[[], list[Process]]]:
    """Name -> one turn: the processes that it takes, one after another."""
    inputs, windows, log = prepared.quantize.inputs, prepared.calibrate.inputs["windows"], scratch / "log"
    outputs = {name: scratch / origin_of(path).place for name, path in prepared.quantize.outputs.items()}
    anew = scratch / origin_of(prepared.calibrate.outputs["statistics"]).place
    settings = ["--group-size", str(prepared.group_size), "--damping", str(DAMPING), "--threads", str(options.threads)]
    solver = [
        str(HERE / "gptq_solvers.py"),
        "--model",
        inputs["model"],
        "--statistics",
        inputs["statistics"],
        *settings,
        "--solver",
    ]
    whole = ["--model", inputs["model"], "--windows", windows, "--output", str(scratch / "packed"), *settings]
    commands = {
        CACHED: [job(prepared.quantize, **outputs)],
        OWN_SOLVER: [[sys.executable, *solver, "quantgrid"]],
        PEER_SOLVER: [[options.peers, *solver, "llm-compressor"]],
        CALIBRATED: [job(prepared.calibrate, statistics=anew), job(prepared.quantize, statistics=anew, **outputs)],
        ONESHOT: [[options.peers, str(HERE / "gptq_oneshot.py"), *whole]],
        GPTQMODEL: [[options.gptqmodel, str(HERE / "gptq_gptqmodel.py"), *whole]],
    }
    return {
        name: lambda parts=parts: [run(part, options.threads, log) for part in parts]
        for name, parts in commands.items()
    }


def take_turns(
    calls: dict[str, Callable[[], list[Process]]], options: argparse.Namespace
) -> dict[str, list[list[Process]]]:
    """All turns of every contender; of a whole peer the first ``peer_repeats`` rounds only.
    Progress to standard error."""
    taken: dict[str, list[list[Process]]] = {name: [] for name in calls}
    for turn in range(max(options.repeats, options.peer_repeats)):
        for name, call in calls.items():
            if turn < (options.peer_repeats if name in (ONESHOT, GPTQMODEL) else options.repeats):
                taken[name].append(call())
                print(f"turn {turn + 1}, {name}: {seconds_of(name, taken[name][-1]):.1f} s", file=sys.stderr)
    return taken


def seconds_of(name: str, parts: list[Process]) -> float:
    """Seconds of one turn: from start to end of its processes or, of a solver, inside of it."""
    if name in (OWN_SOLVER, PEER_SOLVER):
        return json.loads(parts[0].output.splitlines()[-1])["seconds"]
    return sum(part.seconds for part in parts)


def rows_of(taken: dict[str, list[list[Process]]], options: argparse.Namespace) -> list[dict[str, object]]:
    milliseconds = {
        name: 1e3 * statistics.median(seconds_of(name, parts) for parts in turns) for name, turns in taken.items()
    }
    peaks = {
        name: f"{statistics.median(max(part.peak_mb for part in parts) for parts in turns):.0f}"
        for name, turns in taken.items()
    }
    return [
        timed_row(
            BENCHMARK,
            case,
            options.threads,
            reference,
            milliseconds,
            goal,
            peak_mb=peaks[case],
            reference_peak_mb=peaks[reference],
            repeats=f"{len(taken[case])} / {len(taken[reference])}",
        )
        for case, reference, goal in WANTED
    ]


def printed(taken: dict[str, list[list[Process]]], name: str) -> dict[str, float]:
    """Parse the last line that the last turn of a worker printed."""
    return json.loads(taken[name][-1][0].output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="folder of benchmarks.csv and .md, and of the workflow's steps",
    )
    parser.add_argument("--config", default="config/config.yaml", help="where model and calibration are defined")
    parser.add_argument("--model", help="name of a model there; by default the first")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peer-repeats", type=int, default=1, help="of llm-compressor's oneshot and of GPTQModel, which take longest"
    )
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers/bin/python"),
        help="the Python of llm-compressor (make .venv-peers/.installed)",
    )
    parser.add_argument(
        "--gptqmodel",
        default=str(ROOT / ".venv-gptqmodel/bin/python"),
        help="that of GPTQModel (make .venv-gptqmodel/.installed)",
    )
    options = parser.parse_args()
    for python in (options.peers, options.gptqmodel):
        if not Path(python).is_file():
            parser.error(f"{python} is not there: `make {Path(python).parents[1].name}/.installed` makes it")
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as folder:
        prepared = prepare(options, Path(folder))
        for python, script in ((options.peers, "gptq_oneshot.py"), (options.gptqmodel, "gptq_gptqmodel.py")):
            run(
                [python, str(HERE / script), "--help"], options.threads, Path(folder) / "log"
            )  # their files come from the disk once
        taken = take_turns(contenders(prepared, options, Path(folder)), options)
    rows = rows_of(taken, options)
    for row in rows:
        show(row)
    own, peer = (printed(taken, name) for name in (OWN_SOLVER, PEER_SOLVER))
    print(
        f"mean relative output error over {own['linears']} linears: quantgrid {own['output_error']:.5f}, "
        f"llm-compressor "
        f"{peer['output_error']:.5f}"
    )
    for name in (ONESHOT, GPTQMODEL):
        print(f"{name}: {printed(taken, name)['linears']} linears, {printed(taken, name)['imports']:.1f} s of imports")
    record(BENCHMARK, rows, ROOT / options.results)


if __name__ == "__main__":
    main()
