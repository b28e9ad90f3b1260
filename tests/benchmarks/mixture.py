"""A mixture of experts through all jobs: ``python tests/benchmarks/mixture.py``
(``make bench BENCH=mixture``).

One decoder layer with the sizes of Qwen1.5-MoE-A2.7B (60 experts and a shared one, 570 million random
bfloat16 parameters, a vocabulary of 512) goes through the workflow's own jobs in fresh processes:
fetched, tokenized, calibrated, both gates, a randomized Hadamard rotation rounded to nearest and
channel scales with GPTQ, evaluated. Two transforms that read the weights of all experts are fitted
as well. A job whose resident memory passes ``--limit-mb`` is killed; the
goal is 4 GB for each.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from larger_than_memory import TOKENIZER, command_of, limited  # noqa: E402
from records import record, row, show  # noqa: E402

from quantgrid.config import check  # noqa: E402
from quantgrid.ground.storage import read_json, write_json  # noqa: E402
from quantgrid.models.plans import END_ROLES, Stored  # noqa: E402
from quantgrid.models.shapes import ModelShape, layer_tensors  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402
from quantgrid.plan.steps import Step  # noqa: E402

BENCHMARK, GOAL_MB = "mixture", 4000
SHAPE = ModelShape("Qwen2MoeForCausalLM", 2048, 5632, 1, 16, 16, 128, 512, 60, 4, 1408, 5632)
RECIPES = {"hadamard": "rtn", "scaling": "gptq"}  # transform -> mitigation
FITTED = ("searched", "principal")  # transforms that are fitted only
TRANSFORMS = {
    "hadamard": {"method": "random_hadamard"},
    "scaling": {"method": "scaling", "alpha": 0.5},
    "searched": {"method": "awq", "points": 2},  # its memory does not grow with the points
    "principal": {"method": "random_hadamard", "rotations": ["R1", "R2"], "basis": "weights"},
}


def make(folder: Path, shape: ModelShape) -> None:
    """The model's folder, a file for the ends and one for every layer. Weights are normal, their standard
    deviation one over the root of their columns; those of an expert are the first one's turned by some
    rows, since it takes long to draw half a billion."""
    import torch

    from quantgrid.ground.storage import write_tensors

    config = {
        "architectures": [shape.architecture],
        "model_type": shape.family.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.active_experts,
        "moe_intermediate_size": shape.expert_size,
        "shared_expert_intermediate_size": shape.shared_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def weight(*size: int) -> torch.Tensor:
        if size not in drawn:
            drawn[size] = torch.empty(size, dtype=torch.bfloat16).normal_(0, size[-1] ** -0.5, generator=generator)
        drawn[size] = drawn[size].roll(1, 0)
        return drawn[size]

    files: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}.safetensors"
        write_tensors(folder / name, tensors)
        files.update(dict.fromkeys(tensors, name))

    gain = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    ends = {END_ROLES[role]: weight(shape.vocabulary, shape.hidden_size) for role in ("embedding", "lm_head")}
    shard(0, {**ends, END_ROLES["final_norm"]: gain})
    for layer in range(shape.layers):
        names, plan = layer_tensors(shape, layer), shape.plan(layer)
        tensors = {names[norm]: gain.clone() for norm in plan.norms}
        tensors |= {names[role]: weight(*shape.linear_size(role)) for role in (*plan.linears, *plan.readers)}
        tensors |= {names[f"{role}_bias"]: weight(shape.linear_size(role)[0]) for role in shape.family.biased(config)}
        assert all(Stored(name).name == place.name for name, place in plan.stored.items())
        shard(layer + 1, tensors)
    write_json(folder / "config.json", config)
    write_json(folder / "model.safetensors.index.json", {"weight_map": files})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def config_of(options: argparse.Namespace, model: Path, results: Path) -> dict:
    """A config of the recipes and the full precision of the model in ``model``."""
    corpus = {"source": "builtin", "windows": options.windows, "window": options.tokens}
    first, *others = [
        {"transforms": [transform], "mitigations": [mitigation], "granularities": ["channel"], "formats": ["int4"]}
        for transform, mitigation in (*RECIPES.items(), *((name, "rtn") for name in FITTED))
    ]
    return check(
        {
            "results_dir": str(results),
            "threads": options.threads,
            "compute": {"device": "cpu", "dtype": "float32"},
            "models": {"synthetic": {"source": "local", "path": str(model)}},
            "corpora": {part: {**corpus, "part": part} for part in ("calibration", "evaluation")},
            "calibrations": {"default": {"corpus": "calibration", "samples": 64}},
            "transforms": TRANSFORMS,
            "mitigations": {"gptq": {"method": "gptq", "propagation": options.propagation}},
            "evaluation": {"batch_size": 1},
            "evaluate": {"perplexity": ["evaluation"]},
            "studies": {"s": {"models": ["synthetic"], **first, "also": others}},
        }
    )


def steps_of(plan: Plan) -> list[Step]:
    """The jobs of all quantized cells, each after what it reads; of those in ``FITTED`` only the fit."""
    quantized = [cell for cell in plan.cells if cell.quantized]
    cells = [cell for cell in quantized if cell.transform in RECIPES]
    [shard] = plan.shards("evaluation")
    return [
        plan.fetch_model("synthetic"),
        plan.tokenize_corpus("synthetic", "calibration"),
        plan.tokenize_all("synthetic", "evaluation"),
        plan.gate_model("synthetic"),
        plan.calibrate_model("synthetic", "default"),
        plan.evaluate_reference("synthetic", "evaluation", shard),
        *(plan.fit_transform(cell) for cell in quantized),
        *(plan.gate_transform(cell) for cell in cells),
        *(plan.quantize_model(cell) for cell in cells),
        *(plan.evaluate_perplexity(cell, "evaluation", shard) for cell in cells),
    ]


def case_of(step: Step) -> str:
    """Name of a job in the table."""
    about = [step.wildcards[name] for name in ("transform", "mitigation") if name in step.wildcards]
    return " ".join([step.rule, *([f"({', '.join(about)})"] if about else [])])


def measure(options: argparse.Namespace, scratch: Path) -> None:
    """A row for every job, recorded as soon as it has ended."""
    log, model, rows = scratch / "log", options.model or scratch / "model", []
    if not model.is_dir():
        model.mkdir()
        limited(
            [sys.executable, __file__, "--make", str(model), "--experts", str(options.experts)],
            options.threads,
            options.limit_mb,
            log,
        )
    for step in steps_of(Plan(config_of(options, model, scratch / "results"))):
        seconds, peak = limited(command_of(step), options.threads, options.limit_mb, log)
        rows.append(
            row(
                BENCHMARK,
                f"{case_of(step)}, {options.experts} experts",
                options.threads,
                f"{GOAL_MB} MB",
                peak / GOAL_MB,
                1,
                milliseconds=f"{1e3 * seconds:.4g}",
                peak_mb=f"{peak:.0f}",
                reference_peak_mb=f"{GOAL_MB}",
                repeats=1,
            )
        )
        show(rows[-1])
        record(BENCHMARK, rows, options.results)
        for path in step.outputs.values():
            found = read_json(path) if path.endswith(".json") else {}
            if found.get("status", "ok") != "ok":
                raise SystemExit(f"{path}: {found.get('reason')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--experts", type=int, default=SHAPE.experts)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--propagation", default="sequential", help="of GPTQ: sequential or cached")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=6500, help="a job is killed beyond")
    parser.add_argument("--scratch", type=Path, help="folder for some 5 GB that are deleted afterwards")
    parser.add_argument("--model", type=Path, help="where the model is, or is to be left for another run")
    # what this file tells itself in another process
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, replace(SHAPE, experts=options.experts))
        return
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-", dir=options.scratch) as scratch:
        measure(options, Path(scratch))


if __name__ == "__main__":
    main()
