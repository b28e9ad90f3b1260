"""A model larger than the memory of its jobs: ``python tests/benchmarks/larger_than_memory.py``
(``make bench BENCH=larger_than_memory``).

A Llama of three billion random bfloat16 parameters (the layers of Llama-3.2-3B, a vocabulary of
32,000, lm_head untied), written shard by shard, goes through the workflow's own jobs in fresh
processes: fetched, tokenized, calibrated, transformed (a randomized Hadamard rotation, online
before the down projection), quantized, evaluated. A job whose resident memory passes ``--limit-mb``
is killed. The peak of each job is compared with ``resources.held_mb``, the memory that a model run
one decoder layer at a time has to hold; the goal is 1.3 times that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from records import record, row, show  # noqa: E402
from turns import ALLOCATOR  # noqa: E402

from quantgrid.config import check  # noqa: E402
from quantgrid.ground.provenance import canonical  # noqa: E402
from quantgrid.ground.storage import write_json  # noqa: E402
from quantgrid.machine.memory import MIB, disk_bytes, held_mb, parameters, peak_mb  # noqa: E402
from quantgrid.models.plans import END_ROLES, LINEARS  # noqa: E402
from quantgrid.models.shapes import ModelShape, layer_tensors  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.plan.steps import OPTIONAL_INPUTS, Step  # noqa: E402

BENCHMARK, GOAL, TOKENIZER = "larger_than_memory", 1.3, ROOT / "tests" / "data" / "tiny-llama"
LLAMA3 = {
    "Llama-3.1-8B": ModelShape("LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128, 128256),
    "Llama-3.1-70B": ModelShape("LlamaForCausalLM", 8192, 28672, 80, 64, 8, 128, 128256),
}
WATCHED = 0.1  # seconds between two looks at a job's memory; its peak is the kernel's own count


def config_of(options: argparse.Namespace, model: Path, results: Path) -> dict:
    """A config of one quantized cell of the model in ``model`` and its full precision."""
    return check(
        {
            "results_dir": str(results),
            "threads": options.threads,
            "compute": {"device": "cpu", "dtype": options.dtype},
            "models": {"synthetic": {"source": "local", "path": str(model)}},
            "corpora": {
                "calibration": {
                    "source": "builtin",
                    "part": "calibration",
                    "windows": options.windows,
                    "window": options.tokens,
                },
                "evaluation": {
                    "source": "builtin",
                    "part": "evaluation",
                    "windows": options.windows,
                    "window": options.tokens,
                },
            },
            "calibrations": {"default": {"corpus": "calibration", "samples": 64}},
            "transforms": {"hadamard": {"method": "random_hadamard"}},
            "mitigations": {options.mitigation: {"method": options.mitigation}},
            "evaluation": {"batch_size": 1},
            "evaluate": {"perplexity": ["evaluation"]},
            "studies": {
                "s": {
                    "models": ["synthetic"],
                    "transforms": ["hadamard"],
                    "mitigations": [options.mitigation],
                    "granularities": ["group-64"],
                    "formats": ["int4"],
                }
            },
        }
    )


def make(folder: Path, shape: ModelShape) -> None:
    """The model's folder: a shard for the ends and one for every layer. Weights are normal, their
    standard deviation one over the root of their columns; those of a layer are the first one's
    turned by some rows, since it takes minutes to draw three billion."""
    import torch

    from quantgrid.ground.storage import write_tensors

    config = {
        "architectures": [shape.architecture],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, size[-1] ** -0.5, generator=generator)

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}.safetensors"
        write_tensors(folder / name, tensors)
        files.update(dict.fromkeys(tensors, name))

    files: dict[str, str] = {}
    gain = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    ends = {END_ROLES[role]: random(shape.vocabulary, shape.hidden_size) for role in ("embedding", "lm_head")}
    shard(0, {**ends, END_ROLES["final_norm"]: gain})
    del ends
    drawn = {linear: random(*shape.linear_size(linear)) for linear in LINEARS}
    for layer in range(shape.layers):
        names = layer_tensors(shape, layer)
        norms = {names[role]: gain.clone() for role in ("attention_norm", "mlp_norm")}
        shard(layer + 1, {names[linear]: weight.roll(layer, 0) for linear, weight in drawn.items()} | norms)
    write_json(folder / "config.json", config)
    write_json(folder / "model.safetensors.index.json", {"weight_map": files})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def limited(command: list[str], threads: int, limit_mb: int, log: Path) -> tuple[float, float]:
    """Seconds and largest resident memory in MB of ``command`` with the settings that the workflow
    gives its jobs; killed beyond ``limit_mb``."""
    settings = {
        **ALLOCATOR,
        "HF_HUB_OFFLINE": "1",
        **{name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    }
    start = time.perf_counter()
    with open(log, "ab") as output:
        child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output)
    while True:
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            break
        if resident_mb(child.pid) > limit_mb:
            child.kill()
        time.sleep(WATCHED)
    child.returncode, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024
    if child.returncode or peak > limit_mb:
        raise SystemExit(
            f"{' '.join(command)[:300]}: ended with {child.returncode} at {peak:.0f} MB of "
            f"{limit_mb}\n{log.read_text()[-3000:]}"
        )
    return time.perf_counter() - start, peak


def resident_mb(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (FileNotFoundError, IndexError, ProcessLookupError):  # it has just ended
        return 0.0


def steps_of(plan: Plan) -> list[Step]:
    """The jobs of the quantized cell, each after what it reads."""
    [cell] = [cell for cell in plan.cells if cell.quantized]
    [shard] = plan.shards("evaluation")
    return [
        plan.fetch_model("synthetic"),
        plan.tokenize_corpus("synthetic", "calibration"),
        plan.tokenize_all("synthetic", "evaluation"),
        plan.calibrate_model("synthetic", "default"),
        plan.fit_transform(cell),
        plan.evaluate_reference("synthetic", "evaluation", shard),
        plan.quantize_model(cell),
        plan.evaluate_perplexity(cell, "evaluation", shard),
    ]


def command_of(step: Step) -> list[str]:
    """The job of ``step`` as its rule starts it; inputs that it does without are named and empty."""
    named = [word for name, path in {**step.inputs, **step.outputs}.items() for word in (f"--{name}", path)]
    without = [f"--{name}" for name in OPTIONAL_INPUTS.get(step.rule, ()) if name not in step.inputs]
    return [
        sys.executable,
        str(ROOT / "scripts" / "run_job.py"),
        step.rule,
        "--spec",
        canonical(step.spec),
        *named,
        *without,
    ]


def measure(options: argparse.Namespace, scratch: Path) -> None:
    """A row for every job, recorded as soon as it has ended."""
    log, size = scratch / "log", ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    model, shape, rows = options.model or scratch / "model", shape_of(options), []
    if not model.is_dir():
        model.mkdir()
        limited([sys.executable, __file__, "--make", str(model), *size], options.threads, options.limit_mb, log)
    wanted = held_mb(shape, options.windows * options.tokens)
    print(
        f"{parameters(shape) / 1e9:.2f} billion parameters; {wanted} MB have to be held; limit {options.limit_mb} MB",
        file=sys.stderr,
    )
    for step in steps_of(Plan(config_of(options, model, scratch / "results"))):
        seconds, peak = limited(command_of(step), options.threads, options.limit_mb, log)
        case = f"{step.rule} ({options.mitigation})" if step.rule == "quantize_model" else step.rule
        rows.append(
            row(
                BENCHMARK,
                f"{case}, {parameters(shape) / 1e9:.1f} billion parameters",
                options.threads,
                "embeddings, one layer, its Hessians and float64 copy, hidden states, imports",
                peak / wanted,
                GOAL,
                milliseconds=f"{1e3 * seconds:.4g}",
                peak_mb=f"{peak:.0f}",
                reference_peak_mb=f"{wanted}",
                repeats=1,
            )
        )
        show(rows[-1])
        record(BENCHMARK, rows, options.results)
        for name in step.outputs if step.rule in ("evaluate_perplexity", "quantize_model") else ():
            if step.outputs[name].endswith(".json"):
                status = json.loads(Path(step.outputs[name]).read_text())["status"]
                if status != "ok":
                    raise SystemExit(f"{step.outputs[name]}: the cell failed: {log.read_text()[-1000:]}")
    disk = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{disk / 1e9:.1f} GB of disk", file=sys.stderr)


def stated(tokens: int) -> str:
    """A Markdown table: what Llama-3 models take on corpora of ``tokens`` tokens, memory and disk
    in GB."""
    jobs = ("calibrate_model", "quantize_model", "evaluate_perplexity")
    files = ("fetch_model", "calibrate_model", "quantize_model", "evaluate_reference")
    heads = [
        "model",
        "to be held",
        f"times {GOAL:g}",
        *(f"{job}, predicted" for job in jobs),
        *(f"{job}, on disk" for job in files),
    ]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for name, shape in LLAMA3.items():
        held = held_mb(shape, tokens) * MIB
        memory, disk = (
            [peak_mb(job, shape, tokens) * MIB for job in jobs],
            [disk_bytes(job, shape, tokens) for job in files],
        )
        lines.append([name, *(f"{value / 1e9:.1f}" for value in (held, GOAL * held, *memory, *disk))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shape_of(options: argparse.Namespace) -> ModelShape:
    heads = options.hidden // 128
    return ModelShape(
        "LlamaForCausalLM", options.hidden, options.hidden * 8 // 3, options.layers, heads, heads // 3, 128, 32000
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3072, help="a multiple of 384")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--mitigation", default="rtn")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=6000, help="a job is killed beyond")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for some 20 GB that are deleted afterwards; by default that of temporary files",
    )
    parser.add_argument(
        "--stated",
        type=int,
        metavar="TOKENS",
        help="measure nothing: print memory and time of 8B and 70B on TOKENS tokens",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="where the model is, or is to be left for another run; by default in --scratch",
    )
    # what this file tells itself in another process
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, shape_of(options))
        return
    if options.stated:
        print(stated(options.stated))
        return
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-", dir=options.scratch) as scratch:
        measure(options, Path(scratch))


if __name__ == "__main__":
    main()
