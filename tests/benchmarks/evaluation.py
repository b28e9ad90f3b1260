"""Speed of a quantized model's perplexity run: ``python tests/benchmarks/evaluation.py`` (``make
bench BENCH=evaluation``).

SmolLM2-135M in bfloat16, rounded to nearest in INT4 per channel (activations per token), in NVFP4,
and in INT4 behind a rotation of which a part stays online, against the unmodified model as
transformers runs it. All of them go through quantgrid's ``evaluate`` (loss and divergence) on the
same windows. They are loaded from the workflow's own checkpoints into one process and take turns;
memory is that of a process that holds one of them alone. Loss and divergence cost all sides the
same; rows without a goal leave out the divergence, or both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from prepared import make  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import peak_mb, run  # noqa: E402

from quantgrid.config import validation as configs  # noqa: E402
from quantgrid.ground.storage import read_json, write_json  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402

BENCHMARK, CORPUS, PLAIN = "evaluation", "library-docs", "bfloat16 model of transformers"
PARTS = ("", ", without divergence", ", hidden states alone")  # of a perplexity run
# Case -> (transform, format, highest ratio of times that is the goal: the inverse of a speed)
CASES = {
    "INT4 per channel": ("none", "int4", 1 / 0.8),
    "NVFP4": ("none", "nvfp4", 1 / 0.6),
    "INT4 per channel, online rotation": ("hadamard", "int4", 1 / 0.7),
}


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """The config that is named, with one study: the cases, rounded to nearest and evaluated in
    bfloat16 on the CPU."""
    content = configs.read(options.config)
    study = {
        "models": [options.model or next(iter(content["models"]))],
        "mitigations": ["rtn"],
        "granularities": ["native"],
        "formats": ["nvfp4"],
        "transforms": ["none"],
        "also": [{"transforms": ["none", "hadamard"], "formats": ["int4"]}],
    }
    return {
        **content,
        "results_dir": str(options.results),
        "threads": options.threads,
        "compute": {"device": "cpu", "dtype": "bfloat16"},
        "keep_checkpoints": True,
        "transforms": {"none": {"method": "none"}, "hadamard": {"method": "random_hadamard", "seed": 0}},
        "mitigations": {"rtn": {"method": "rtn"}},
        "evaluate": {"perplexity": [CORPUS]},
        "studies": {"evaluation": study},
    }


def prepare(options: argparse.Namespace, scratch: Path) -> Path:
    """Let the workflow make models, windows and checkpoints; the file that tells the worker where
    they lie."""
    content = config_of(options)
    plan = Plan(configs.check(content))
    cells = {(cell.transform, cell.format): cell for cell in plan.cells}
    first = plan.shards(CORPUS)[0]
    steps = {
        name: plan.evaluate_perplexity(cells[transform, form], CORPUS, first)
        for name, (transform, form, _) in CASES.items()
    }
    make(content, scratch, [path for step in steps.values() for path in step.inputs.values()], options.threads)
    paths = {name: dict(step.inputs) for name, step in steps.items()}
    write_json(scratch / "paths.json", paths)
    return scratch / "paths.json"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In this process: median milliseconds of every part of every side over the windows; how many
    tokens they are; its peak in MB."""
    import torch
    from turns import medians

    from quantgrid.calibration.layers import DecoderFolder
    from quantgrid.corpora import token_windows
    from quantgrid.evaluation.perplexity import evaluate, final_hidden, window_losses
    from quantgrid.ground.storage import read_tensors
    from quantgrid.models.lm_head import head_of
    from quantgrid.quantization.checkpoints import load_full_precision, load_quantized

    torch.set_num_threads(options.threads)
    inputs = read_json(options.paths)
    shared = next(iter(inputs.values()))
    windows = token_windows.load(shared["windows"])[0][: options.batch * options.batches]
    hidden, head = read_tensors(shared["reference"])["hidden"], DecoderFolder(shared["model"]).head(torch.bfloat16)

    def losses(model: torch.nn.Module) -> list[float]:
        states = final_hidden(model, windows, options.batch)
        with torch.no_grad():
            return [window_losses(state, head_of(model), window)[0] for state, window in zip(states, windows)]

    calls: dict[str, Any] = {}
    for side in options.sides:
        model = (
            load_full_precision(shared["model"], torch.bfloat16)
            if side == PLAIN
            else load_quantized(Path(inputs[side]["checkpoint"]).parent, torch.bfloat16)
        )
        parts = (
            partial(evaluate, model, windows, hidden, lambda: head, options.batch),
            partial(losses, model),
            partial(final_hidden, model, windows, options.batch),
        )
        calls |= {side + part: call for part, call in zip(PARTS, parts)}
    return {"milliseconds": medians(calls, options.repeats), "tokens": windows.numel(), "peak_mb": peak_mb()}


def worker(options: argparse.Namespace, paths: Path, sides: list[str], repeats: int, log: Path) -> dict[str, Any]:
    """Run :func:`measure` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--paths",
        str(paths),
        "--repeats",
        str(repeats),
        "--threads",
        str(options.threads),
        "--batch",
        str(options.batch),
        "--batches",
        str(options.batches),
        "--sides",
        *sides,
    ]
    return json.loads(run(command, options.threads, log).output.splitlines()[-1])


def rows_of(found: dict[str, Any], peaks: dict[str, float], options: argparse.Namespace) -> list[dict[str, object]]:
    return [
        timed_row(
            BENCHMARK,
            name + part,
            options.threads,
            PLAIN + part,
            found["milliseconds"],
            None if part else goal,
            repeats=options.repeats,
            peak_mb=f"{peaks[name]:.0f}",
            reference_peak_mb=f"{peaks[PLAIN]:.0f}",
        )
        for part in PARTS
        for name, (_, _, goal) in CASES.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="folder of benchmarks.csv and .md, and of the workflow's steps",
    )
    parser.add_argument("--config", default="config/config.yaml", help="where model and corpora are defined")
    parser.add_argument("--model", help="name of a model there; by default the first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="as many as a job of the workflow has")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--batches", type=int, default=2)
    # what this file tells itself in another process
    parser.add_argument("--paths", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sides:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as folder:
        paths, log = prepare(options, Path(folder)), Path(folder) / "log"
        found = worker(options, paths, [*CASES, PLAIN], options.repeats, log)
        peaks = {side: worker(options, paths, [side], 1, log)["peak_mb"] for side in [*CASES, PLAIN]}
    rows = rows_of(found, peaks, options)
    for row in rows:
        show(row)
    for name in [*CASES, PLAIN]:
        print(f"{name}: {1e3 * found['tokens'] / found['milliseconds'][name]:.0f} tokens a second")
    record(BENCHMARK, rows, ROOT / options.results)


if __name__ == "__main__":
    main()
