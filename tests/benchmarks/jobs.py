"""Start-up of jobs: ``python tests/benchmarks/jobs.py`` (``make bench BENCH=jobs``).

Jobs of one cell of the smoke config on one thread, each a fresh process as its rule starts it. The
model is so small that start-up is nearly all of it. References are what a job may take (3 s where
it needs torch alone, 7 s where it runs a model of transformers) and what it cannot do without: a
process that imports torch, or a model's class of transformers besides. Processor seconds are
printed too: other work on the machine does not lengthen them. The same jobs are taken as forks of a
process that has their imports (`quantgrid.jobs.fork_server`), and so is the whole smoke run on two
cores, against 4 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from prepared import job, job_server, make, workflow  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import ALLOCATOR, Process, run  # noqa: E402

from quantgrid.config import validation as configs  # noqa: E402
from quantgrid.jobs.integrity import origin_of  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.plan.steps import Step  # noqa: E402

BENCHMARK, CORPUS, TASKS = "jobs", "docs", ("cloze",)
TORCH, TRANSFORMERS = "import torch", "import torch and a model of transformers"
IMPORTS = {TORCH: "import torch", TRANSFORMERS: "import torch; from transformers import LlamaForCausalLM"}
WARM = ", warm start"
SMOKE, SMOKE_LIMIT = "smoke run on 2 cores", 240.0
LIMITS = {TORCH: 3.0, TRANSFORMERS: 7.0}  # seconds of a job that imports no more
# Rule -> what its job cannot do without; lm-eval, which tasks need, has no limit.
NEEDS = {
    "fit_transform": TORCH,
    "quantize_model": TORCH,
    "calibrate_model": TRANSFORMERS,
    "evaluate_reference": TRANSFORMERS,
    "evaluate_perplexity": TRANSFORMERS,
    "evaluate_tasks": None,
}


@dataclass(frozen=True)
class Case:
    """A job of the workflow, and the import that bounds it from below."""

    step: Step
    needs: str | None


def prepare(folder: Path) -> dict[str, Case]:
    """Name -> case, of one cell of the smoke config; the workflow has made what the jobs read."""
    content = configs.read(ROOT / "config" / "smoke.yaml")
    study = {
        "models": list(content["models"]),
        "transforms": ["smoothquant"],
        "mitigations": ["gptq"],
        "granularities": ["channel"],
        "formats": ["int4"],
    }
    content |= {
        "results_dir": str(folder / "results"),
        "keep_checkpoints": True,
        "transforms": {"smoothquant": content["transforms"]["smoothquant"]},
        "mitigations": {"gptq": content["mitigations"]["gptq"]},
        "tasks": {name: content["tasks"][name] for name in TASKS},
        "studies": {"jobs": study},
        "report": {},
    }
    plan = Plan(configs.check(content))
    cell = next(cell for cell in plan.cells if cell.quantized)
    [shard] = plan.shards(CORPUS)
    steps = (
        plan.fit_transform(cell),
        plan.quantize_model(cell),
        plan.calibrate_model(cell.model, "default"),
        plan.evaluate_reference(cell.model, CORPUS, shard),
        plan.evaluate_perplexity(cell, CORPUS, shard),
        plan.evaluate_tasks(cell, TASKS),
    )
    make(content, folder, [path for step in steps for path in step.inputs.values()], 2)
    return {f"job {step.rule}": Case(step, NEEDS[step.rule]) for step in steps}


def command(step: Step, folder: Path) -> list[str]:
    """The job of ``step``, with outputs in ``folder`` that are not there yet."""
    made = Path(tempfile.mkdtemp(dir=folder))
    return job(step, **{name: made / origin_of(path).place for name, path in step.outputs.items()})


def take_turns(cases: dict[str, Case], folder: Path, repeats: int, served: dict[str, str]) -> dict[str, list[Process]]:
    """Processes of every import and case, fresh and as a fork of the server of ``served``, once per
    repeat; one more round is not counted."""
    taken: dict[str, list[Process]] = {name: [] for name in (*IMPORTS, *cases, *(name + WARM for name in cases))}
    for _ in range(repeats + 1):
        for name, turns in taken.items():
            wanted = (
                [sys.executable, "-c", IMPORTS[name]]
                if name in IMPORTS
                else command(cases[name.removesuffix(WARM)].step, folder)
            )
            turns.append(run(wanted, 1, folder / "log", {**ALLOCATOR, **served} if name.endswith(WARM) else ALLOCATOR))
    return {name: turns[1:] for name, turns in taken.items()}


def smoke_runs(folder: Path) -> dict[str, float]:
    """Seconds of the whole smoke run from nothing, with a warm start as `make smoke` has it, and
    with every job a fresh process."""
    found = {}
    for name, options in {SMOKE + WARM: [], SMOKE: ["--cold"]}.items():
        made = Path(tempfile.mkdtemp(dir=folder))
        content = configs.read(ROOT / "config" / "smoke.yaml") | {"results_dir": str(made / "results")}
        found[name] = run([*workflow(content, made, 2), *options], 1, folder / "log").seconds
    return found


def rows_of(taken: dict[str, list[Process]], cases: dict[str, Case], repeats: int) -> list[dict[str, object]]:
    milliseconds = {name: 1e3 * statistics.median(turn.seconds for turn in turns) for name, turns in taken.items()}
    peaks = {
        name: f"{statistics.median(turn.peak_mb for turn in turns):.0f}"
        for name, turns in taken.items()
        if not name.endswith(WARM)
    }
    limits = {name: f"limit of {seconds:g} s" for name, seconds in LIMITS.items()}
    milliseconds |= {limits[name]: 1e3 * seconds for name, seconds in LIMITS.items()}
    wanted = [(name, limits[case.needs], 1.0) for name, case in cases.items() if case.needs]
    wanted += [(name, case.needs or TRANSFORMERS, None) for name, case in cases.items()]
    wanted += [(name + WARM, name, None) for name in cases if name + WARM in taken]
    return [
        timed_row(
            BENCHMARK,
            name,
            1,
            reference,
            milliseconds,
            goal,
            peak_mb=peaks.get(name, ""),
            reference_peak_mb=peaks.get(reference, ""),
            repeats=repeats,
        )
        for name, reference, goal in wanted
    ]


def rows_of_smoke(seconds: dict[str, float]) -> list[dict[str, object]]:
    limit = f"limit of {SMOKE_LIMIT:g} s"
    milliseconds = {limit: 1e3 * SMOKE_LIMIT, **{name: 1e3 * value for name, value in seconds.items()}}
    return [
        timed_row(BENCHMARK, name, 1, limit, milliseconds, 1.0 if name.endswith(WARM) else None, repeats=1)
        for name in seconds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-smoke", action="store_true", help="leave out the two whole smoke runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as folder:
        cases = prepare(Path(folder))
        with job_server() as served:
            taken = take_turns(cases, Path(folder), options.repeats, served)
        rows = rows_of(taken, cases, options.repeats)
        if not options.no_smoke:
            rows += rows_of_smoke(smoke_runs(Path(folder)))
    for row in rows:
        show(row)
    for name in (*IMPORTS, *cases):  # of a fork the kernel tells nothing here
        print(f"{name}: {statistics.median(turn.processor_seconds for turn in taken[name]):.2f} s of a processor")
    record(BENCHMARK, rows, options.results)


if __name__ == "__main__":
    main()
