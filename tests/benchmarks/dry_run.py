"""Benchmark of planning (`make bench-plan`): dry runs of the paper's grid, of 10,000 cells, and of
a complete default run; of 10,000 cells in rules without quantgrid; greedy and ILP scheduling.

    python tests/benchmarks/dry_run.py [--output results/benchmarks-plan]

Writes processor time and wall time in seconds and peak memory in MiB as CSV and, with their
limits, as a figure. Limits of time are multiples of what rules that only name files take for 10,000
cells in the same run. Planning is one thread, so its processor time is its wall time on an idle
machine; the limit is held against that, and what else runs meanwhile does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import yaml  # noqa: E402
from records import write_table  # noqa: E402
from turns import run  # noqa: E402

from checkouts import Checkout  # noqa: E402

CELLS_PER_ALPHA = 200  # 40 ranks x 5 granularities
JOBS = 600  # of the comparison of schedulers: half of them wait for the other half
TRIVIAL = f"""
rule all:
    input:
        expand("second/{{n}}", n=range({JOBS // 2})),


rule first:
    output:
        "first/{{n}}",
    shell:
        "touch {{output}}"


rule second:
    input:
        "first/{{n}}",
    output:
        "second/{{n}}",
    shell:
        "touch {{output}}"
"""
CELLS = 10_000
# what Snakemake itself takes for a grid: as many jobs, inputs and outputs of a cell as in quantgrid's plan
BARE = f"""
rule all:
    input:
        expand("quantized/{{n}}/{{name}}", n=range({CELLS}), name=("error", "record")),
        expand("merged/{{n}}/{{name}}", n=range({CELLS}), name=("result", "record")),


rule share:
    output:
        "shared/{{name}}",
    shell:
        "touch {{output}}"


rule quantize:
    input:
        expand("shared/quantize-{{name}}", name=range(10)),
    output:
        "quantized/{{n}}/model",
        "quantized/{{n}}/manifest",
        "quantized/{{n}}/error",
        "quantized/{{n}}/record",
    shell:
        "touch {{output}}"


rule evaluate:
    input:
        "quantized/{{n}}/model",
        "quantized/{{n}}/manifest",
        "quantized/{{n}}/record",
        expand("shared/evaluate-{{name}}", name=range(6)),
    output:
        "evaluated/{{n}}/{{shard}}/result",
        "evaluated/{{n}}/{{shard}}/record",
    shell:
        "touch {{output}}"


rule merge:
    input:
        expand("evaluated/{{{{n}}}}/{{shard}}/{{name}}", shard=range(2), name=("result", "record")),
    output:
        "merged/{{n}}/result",
        "merged/{{n}}/record",
    shell:
        "touch {{output}}"
"""
SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 64,
    "vocabulary": 128256,
}
# planned, never fetched
MODEL = {"source": "hub", "id": "meta-llama/Llama-3.2-1B", "revision": "main", "shape": SHAPE}


@dataclass
class Case:
    """One measurement: the config of a dry run, the processor time that it may take, as a multiple of that of
    the bare rules in the same run, and its MiB."""

    name: str
    config: str
    ratio: float | None
    mebibytes: float | None


BARE_RULES = "10,000 cells, bare rules"
CASES = (
    Case("the paper's grid", "paper", 0.2, 2048),
    Case("10,000 cells", "ten-thousand", 2.0, 2048),
    Case("nothing to do", "config", 0.2, 2048),
)


def config_of(alphas: int) -> dict:
    """The config of one study of one model, with ``alphas`` x ``CELLS_PER_ALPHA`` cells."""
    names = [f"alpha-{number}" for number in range(alphas)]
    return {
        "results_dir": f"results-{alphas}",
        "models": {"llama": MODEL},
        "corpora": {
            name: {
                "source": "hub",
                "id": "Salesforce/wikitext",
                "name": "wikitext-2-raw-v1",
                "split": name,
                "windows": 64,
                "window": 2048,
            }
            for name in ("train", "test")
        },
        "calibrations": {"default": {"corpus": "train"}},
        "transforms": {name: {"method": "scaling", "alpha": number / alphas} for number, name in enumerate(names)},
        "mitigations": {f"rank-{rank}": {"method": "low_rank", "rank": rank} for rank in range(1, 41)},
        "evaluate": {"perplexity": ["test"]},
        "studies": {
            "all": {
                "models": ["llama"],
                "transforms": names,
                "mitigations": [f"rank-{rank}" for rank in range(1, 41)],
                "granularities": ["channel", "group-128", "group-64", "group-32", "group-16"],
                "formats": ["int4"],
                "table": {"rows": ["transform"], "columns": ["mitigation"], "metrics": ["perplexity"]},
                "figure": {
                    "kind": "dots",
                    "x": "mitigation",
                    "hue": "transform",
                    "metric": "perplexity",
                    "scale": "log",
                },
            }
        },
    }


def planned_bare(folder: Path) -> list[str]:
    """The command that plans as many cells by rules that do no more than name files."""
    folder.mkdir()
    (folder / "Snakefile").write_text(BARE)
    return [sys.executable, "-m", "snakemake", "--dry-run", "--quiet", "--cores", "2"]


def scheduled(scheduler: str, folder: Path) -> list[str]:
    """The command that runs trivial jobs under the default profile, with one scheduler or the
    other."""
    folder.mkdir()
    (folder / "Snakefile").write_text(TRIVIAL)
    profile = ROOT / "workflow" / "profiles" / "default"
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--workflow-profile",
        str(profile),
        "--scheduler",
        scheduler,
        "--quiet",
    ]


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    names = [row["case"] for row in rows]
    axes.barh(names, [row["processor_seconds"] for row in rows], color="#4477aa")
    limited = [row for row in rows if row["limit_seconds"] is not None]
    axes.plot(
        [row["limit_seconds"] for row in limited],
        [row["case"] for row in limited],
        "|",
        color="black",
        markersize=18,
        label="limit",
    )
    for row in rows:
        said = f"{row['processor_seconds']:.1f} s, {row['mebibytes']:.0f} MiB"
        end = max(row["processor_seconds"], row["limit_seconds"] or 0)
        axes.annotate(said, (end, row["case"]), (6, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set_xlabel("processor seconds")
    axes.legend(loc="center right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "results" / "benchmarks-plan",
        help="name of the files less their suffixes",
    )
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout.make(Path(folder) / "quantgrid")
        (checkout.folder / "config" / "ten-thousand.yaml").write_text(
            yaml.safe_dump(config_of(CELLS // CELLS_PER_ALPHA))
        )
        checkout.pretend("config")
        if planned := checkout.planned("config"):
            raise SystemExit(
                f"{len(planned)} jobs are planned where nothing is to be done, the first of them {planned[0]}"
            )
        commands = [(case, checkout.command(case.config, "--dry-run", "--quiet"), checkout.folder) for case in CASES]
        for name, scheduler in (("greedily", "greedy"), ("by the solver", "ilp")):
            place = Path(folder) / scheduler
            commands.append(
                (Case(f"{JOBS} trivial jobs, scheduled {name}", "", None, None), scheduled(scheduler, place), place)
            )
        bare = Path(folder) / "bare"
        commands.insert(0, (Case(BARE_RULES, "", None, None), planned_bare(bare), bare))
        rows, whole = [], 0.0
        for case, command, place in commands:
            done = run(command, 1, Path(folder) / "log", {}, place)
            whole = done.processor_seconds if case.name == BARE_RULES else whole
            limit = None if case.ratio is None else round(case.ratio * whole, 2)
            rows.append(
                {
                    "case": case.name,
                    "processor_seconds": round(done.processor_seconds, 2),
                    "wall_seconds": round(done.seconds, 2),
                    "limit_seconds": limit,
                    "mebibytes": round(done.peak_mb),
                    "limit_mebibytes": case.mebibytes,
                }
            )
            limits = f"; limits {limit} s, {case.mebibytes} MiB" if limit else ""
            print(
                f"{case.name}: {done.processor_seconds:.1f} s of a processor in {done.seconds:.1f} s, "
                f"{done.peak_mb:.0f} MiB{limits}",
                flush=True,
            )
    write_table(rows, output.with_suffix(".csv"))
    draw(rows, output.with_suffix(".png"))
    if any(
        row["processor_seconds"] > row["limit_seconds"] or row["mebibytes"] > row["limit_mebibytes"]
        for row in rows
        if row["limit_seconds"]
    ):
        raise SystemExit("over a limit")


if __name__ == "__main__":
    main()
