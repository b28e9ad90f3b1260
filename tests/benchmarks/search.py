"""Races against the full evaluation: ``python tests/benchmarks/search.py`` (``make bench
BENCH=search``).

The cells of one study on each model are evaluated on 128 windows. A race takes the same windows in
looks of 8, 16, 32, 64 and 128, as stored shards have them, and has to name the recipes that one test
on all windows does not tell apart, with at most 15 % of the window evaluations. Decisions are pure
functions of the losses, so both are computed from the same ones. The seconds of planning a race of
1000 candidates have a limit of 30.

``--models smollm2-135m`` takes a model of config/config.yaml. ``--folder`` keeps the runs, so that an
interrupted benchmark goes on, and models run one by one before all of them are recorded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from prepared import make  # noqa: E402
from records import record, row, show  # noqa: E402

from quantgrid.config import validation  # noqa: E402
from quantgrid.evaluation.races import Conditions, Outcome, cut, decide, race, spent  # noqa: E402
from quantgrid.ground.storage import read_json  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402

BENCHMARK, LOOKS, CORPUS = "search", (8, 16, 32, 64, 128), "text"
SHARE, CANDIDATES, SECONDS = 0.15, 1000, 30.0
MODELS = ("reference-1m", "reference-4m", "reference-12m")
KNOWN = validation.read(ROOT / "config" / "config.yaml")["models"]  # others, such as smollm2-135m
STUDY = {
    "transforms": ["none", "hadamard"],
    "mitigations": ["rtn", "gptq"],
    "granularities": ["native"],
    "formats": ["int4", "int4_sym", "mxfp4", "nvfp4", "nvint4", "w4a16", "w4a16_g64", "w4a8"],
}


def config_of(model: str, results: Path) -> dict[str, Any]:
    """A study of one model whose evaluation has the windows of the race in one shard."""
    docs = {"source": "library_docs", "selection": "random"}
    return {
        "results_dir": str(results),
        "threads": 1,
        "compute": {"device": "cpu", "dtype": "float32"},
        "models": {model: KNOWN.get(model, {"source": "builtin", "name": model})},
        "corpora": {
            "calibration": {**docs, "part": "calibration", "windows": 32, "window": 256},
            CORPUS: {**docs, "part": "evaluation", "windows": LOOKS[-1], "window": 128},
        },
        "calibrations": {"default": {"corpus": "calibration"}},
        "transforms": {"hadamard": {"method": "random_hadamard"}},
        "evaluation": {"shard_windows": LOOKS[-1]},
        "evaluate": {"perplexity": [CORPUS]},
        "studies": {"search": {"models": [model], **STUDY}},
    }


def losses_of(model: str, folder: Path, cores: int) -> dict[str, list[float]]:
    """Divergences per window of every cell."""
    content = config_of(model, folder / "results")
    plan = Plan(validation.check(content))
    cells = [cell for cell in plan.cells if cell.quantized]
    paths = {cell.path: plan.merge_shards(cell, CORPUS).outputs["result"] for cell in cells}
    make(content, folder, [*paths.values(), *["--warm"] * (sys.platform == "linux")], cores)
    return {name: read_json(path)["windows"]["kl_divergence"] for name, path in paths.items()}


def compared(losses: dict[str, list[float]]) -> tuple[Outcome, float, set[str]]:
    """The race on ``losses``, its share of the evaluations, and the recipes that one test on all
    windows does not tell apart."""
    conditions = Conditions(LOOKS, len(losses))
    outcome = race({name: cut(values, LOOKS) for name, values in losses.items()}, conditions)
    whole = decide(losses, {}, Conditions(LOOKS[-1:], len(losses)))
    return outcome, spent(outcome, conditions), set(whole.survivors)


def planning_seconds(results: Path) -> float:
    """Processor seconds of planning a race of ``CANDIDATES`` candidates."""
    content = config_of(MODELS[0], results)
    content["corpora"]["race-text"] = {**content["corpora"][CORPUS], "skip_windows": LOOKS[-1]}
    content["transforms"] = {f"t{number}": {"method": "scaling", "alpha": number / 20} for number in range(20)}
    content["mitigations"] = {f"m{number}": {"method": "low_rank", "rank": number} for number in range(50)}
    axes = {axis: list(content[axis]) for axis in ("transforms", "mitigations")}
    study = {**content["studies"]["search"], **axes, "formats": ["int4"]}
    content["studies"] = {"search": {**study, "race": {"budget": 4.5, "windows": "race-text"}}}
    begun = time.process_time()
    plan = Plan(validation.check(content))
    plan.all_evaluations()
    assert len(plan.raced["search"][0].candidates) == CANDIDATES
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of benchmarks.csv and .md")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="folder of the runs, which stay and go on there")
    options = parser.parse_args()
    rows = []
    kept = nullcontext(options.folder.resolve()) if options.folder else None
    with kept or tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as folder:
        seconds = planning_seconds(Path(folder, "results"))
        limit = f"limit of {SECONDS:g} s"
        about = {"milliseconds": f"{1e3 * seconds:.4g}", "reference_milliseconds": f"{1e3 * SECONDS:.4g}"}
        rows.append(row(BENCHMARK, f"planning of {CANDIDATES} candidates", 1, limit, seconds / SECONDS, 1.0, **about))
        for model in options.models:
            place = Path(folder, model)
            place.mkdir(parents=True, exist_ok=True)
            outcome, share, whole = compared(losses_of(model, place, options.cores))
            same = "the same set" if set(outcome.survivors) == whole else f"{set(outcome.survivors) ^ whole} differ"
            case = f"race of {len(outcome.windows)} recipes of {model}: {len(whole)} kept, {same}"
            rows.append(row(BENCHMARK, case, 1, f"all on {LOOKS[-1]} windows", share, SHARE))
    for found in rows:
        show(found)
    record(BENCHMARK, rows, ROOT / options.results)


if __name__ == "__main__":
    main()
