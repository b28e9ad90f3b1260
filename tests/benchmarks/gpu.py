"""quantgrid on a GPU: ``python tests/benchmarks/gpu.py`` (``make bench BENCH=gpu``), all of it in at most
``--minutes``, part after part; what there is no time for is not measured.

- smoke: perplexities of the smoke config on the GPU against those of the CPU;
- solver: GPTQ, INT4 in groups of 128, of every linear of a layer of the shapes of Llama-3.1-8B, random:
  quantgrid's solver against llm-compressor's (``gptq_solvers.py``, each in a process with a separate
  environment; the Hessians come from calibration of the random model);
- evaluation: tokens of a perplexity run per second of that layer with its vocabulary, rounded to nearest,
  against the bfloat16 model of transformers, both through quantgrid's ``evaluate``;
- fake_quantize: rounding of an activation against a copy of it.

Where there is no CUDA device the rows say so. ``--device cpu --small`` takes the same way on a CPU
with shapes of no interest.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from devices import name_of, now  # noqa: E402
from prepared import workflow  # noqa: E402
from random_models import write_statistics  # noqa: E402
from records import record, show, timed_row, unmeasured  # noqa: E402
from records import row as row_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from turns import medians, run  # noqa: E402

from quantgrid.calibration.layers import DecoderFolder  # noqa: E402
from quantgrid.evaluation.perplexity import evaluate, final_hidden  # noqa: E402
from quantgrid.inference.transform import Transform  # noqa: E402
from quantgrid.machine.devices import Placement  # noqa: E402
from quantgrid.mitigations.methods.rtn import rtn  # noqa: E402
from quantgrid.models.lm_head import head_of  # noqa: E402
from quantgrid.quantization.cached import Recipe, quantize_decoder  # noqa: E402
from quantgrid.quantization.checkpoints import load_full_precision, load_quantized, save_quantized  # noqa: E402
from quantgrid.quantizer import fake_quantize  # noqa: E402
from quantgrid.schemes import activation_scheme  # noqa: E402
from quantgrid.schemes.cell_schemes import CellSchemes  # noqa: E402
from quantgrid.schemes.granularities import cell_schemes  # noqa: E402
from tiny_decoders import Case, random_tokens, save  # noqa: E402

BENCHMARK = "gpu"
GROUP, DAMPING, BATCH = 128, 0.01, 4
LLAMA = partial(Case, "LlamaForCausalLM")
SMOKE, AXES = "smoke config", ("model", "transform", "mitigation", "granularity", "format")
PARTS = {
    "fake_quantize": "rounding of an activation",
    "solver": "GPTQ of a layer",
    "evaluation": "tokens of a perplexity run",
    "smoke": SMOKE,
}
# Perplexities that arithmetic changes by more than half a percent: of trained cells, and of ruined models.
TRAINED, RUINED = ("optimized", "flatquant", "data-free", "finetuned", "qat"), 1000
EVALUATED = {
    "int4": ("channel", 1 / 0.8),
    "nvfp4": ("group-16", 1 / 0.6),
}  # preset -> granularity, highest ratio of times that is the goal


@dataclass(frozen=True)
class Extent:
    """Extent of the measurements: a random decoder with its name, the ``windows`` (count, tokens) that it
    runs on, and the size of an ``activation`` (tokens, channels)."""

    name: str
    decoder: Case
    windows: tuple[int, int]
    activation: tuple[int, int]


WHOLE = Extent(
    "Llama-3.1-8B",
    LLAMA(hidden=4096, intermediate=14336, layers=1, heads=32, kv_heads=8, head_dim=128, vocab=128256),
    windows=(8, 2048),
    activation=(4096, 14336),
)
SMALL = Extent(
    "small",
    LLAMA(hidden=128, intermediate=256, layers=2, heads=2, kv_heads=1, head_dim=64, vocab=61),
    windows=(8, 32),
    activation=(64, 128),
)


def solver_rows(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """GPTQ of the decoder in ``folder``, milliseconds per layer, both solvers in turns; quantgrid's
    alone where llm-compressor is not there."""
    command = [
        str(HERE / "gptq_solvers.py"),
        "--model",
        str(folder),
        "--statistics",
        str(folder / "statistics"),
        "--group-size",
        str(GROUP),
        "--damping",
        str(DAMPING),
        "--threads",
        str(options.threads),
        "--device",
        str(options.device),
        "--solver",
    ]
    case, peer = f"GPTQ of a layer of {name}", "llm-compressor's solver"
    sides = {case: [sys.executable, *command, "quantgrid"]}
    if Path(options.peers).is_file():
        sides[peer] = [options.peers, *command, "llm-compressor"]
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side, words in sides.items():
            printed = json.loads(run(words, options.threads, folder / "log").output.splitlines()[-1])
            taken[side].append(1e3 * printed["seconds"] / printed["layers"])
            print(
                f"{side}, {name}: {taken[side][-1]:.4g} ms a layer, mean relative output error "
                f"{printed['output_error']:.5f}",
                file=sys.stderr,
            )
    found = {side: statistics.median(times) for side, times in taken.items()}
    about = {"device": name_of(options.device), "rate": f"{found[case] / 1e3:.3g} s/layer", "repeats": options.repeats}
    if peer not in found:
        return [
            unmeasured(
                BENCHMARK,
                case,
                "llm-compressor is not installed",
                threads=options.threads,
                milliseconds=f"{found[case]:.4g}",
                reference=peer,
                **about,
            )
        ]
    return [
        timed_row(
            BENCHMARK,
            case,
            options.threads,
            peer,
            found,
            1.0,
            reference_rate=f"{found[peer] / 1e3:.3g} s/layer",
            **about,
        )
    ]


def quantized(folder: Path, preset: str, granularity: str, device: torch.device) -> nn.Module:
    """The decoder in ``folder`` rounded to nearest, packed, and loaded back in bfloat16."""
    schemes = CellSchemes.from_dict(cell_schemes({"preset": preset}, granularity, preset))
    decoder = DecoderFolder(folder, placement=Placement(device))
    done = quantize_decoder(decoder, Recipe(Transform([]), schemes, rtn, str(folder / "statistics")))
    packed = folder / preset
    save_quantized(done.content, packed / "model.safetensors", packed / "quantgrid.json", {})
    return load_quantized(packed, torch.bfloat16, device)


def evaluation_rows(
    name: str, folder: Path, plain: nn.Module, windows: Tensor, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Perplexity runs over ``windows`` of the decoder ``plain``, which lies in ``folder``, and of
    what is made of it."""
    reference, head = final_hidden(plain, windows, BATCH), head_of(plain)
    unmodified = f"{name}, bfloat16"
    models = {unmodified: plain}
    for preset, (granularity, _) in EVALUATED.items():
        models[f"{name}, {preset}"] = quantized(folder, preset, granularity, options.device)
    calls = {side: partial(evaluate, model, windows, reference, lambda: head, BATCH) for side, model in models.items()}
    found = medians(calls, options.repeats, partial(now, options.device))
    rates = {side: f"{1e3 * windows.numel() / milliseconds:.4g} tokens/s" for side, milliseconds in found.items()}
    return [
        timed_row(
            BENCHMARK,
            f"{name}, {preset}",
            options.threads,
            unmodified,
            found,
            goal,
            device=name_of(options.device),
            rate=rates[f"{name}, {preset}"],
            reference_rate=rates[unmodified],
            repeats=options.repeats,
        )
        for preset, (_, goal) in EVALUATED.items()
    ]


def fake_quantize_rows(extent: Extent, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rounding of a bfloat16 activation against a copy of it."""
    drawn = torch.randn(*extent.activation, generator=torch.Generator().manual_seed(0))
    x, copy = drawn.to(options.device, torch.bfloat16), "a copy of it"
    schemes = {f"activation in {preset}": activation_scheme(preset) for preset in EVALUATED}
    calls = {copy: x.clone, **{case: partial(fake_quantize, x, scheme) for case, scheme in schemes.items()}}
    found = medians(calls, options.repeats, partial(now, options.device))
    about = {"device": name_of(options.device), "repeats": options.repeats}
    return [timed_row(BENCHMARK, case, options.threads, copy, found, None, **about) for case in schemes]


def smoke_rows(seconds: float, options: argparse.Namespace, scratch: Path) -> list[dict[str, object]]:
    """Largest ratio of a perplexity of the smoke config to the CPU's; the jobs share one GPU."""
    content = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8"))
    content |= {"compute": {**content["compute"], "device": options.device.type}, "results_dir": str(scratch / "smoke")}
    command = workflow(content, scratch, os.cpu_count() or 1, f"{content['results_dir']}/results.csv")
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}
    try:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [unmeasured(BENCHMARK, SMOKE, f"more than {seconds:.0f} s")]
    return compared(
        list(csv.DictReader((scratch / "smoke" / "results.csv").open(newline=""))),
        list(csv.DictReader((ROOT / "tests" / "data" / "golden-smoke.csv").open(newline=""))),
        options,
    )


def compared(
    results: list[dict[str, str]], golden: list[dict[str, str]], options: argparse.Namespace
) -> list[dict[str, object]]:
    """Rows of the largest ratio of the perplexities of equal cells, larger to smaller: of stable cells, and
    of those that are trained or ruined."""
    found = {tuple(row[axis] for axis in AXES): float(row["value"]) for row in results if row["metric"] == "perplexity"}
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for row in golden:
        cell, wanted = tuple(row[axis] for axis in AXES), float(row["perplexity"])
        stable = wanted < RUINED and not any(name.startswith(TRAINED) for name in cell[1:3])
        ratios[stable].append(math.exp(abs(math.log(found[cell] / wanted))))
    kinds = {SMOKE: (True, 1.005), f"{SMOKE}, trained or ruined cells": (False, 1.1)}
    return [
        row_of(BENCHMARK, case, 1, "perplexities of the CPU", max(ratios[kind]), goal, device=name_of(options.device))
        for case, (kind, goal) in kinds.items()
        if ratios[kind]
    ]


def measure(extent: Extent, options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, object]]:
    """Rows of the ``options.parts``, in the order of :data:`PARTS`."""
    end = time.monotonic() + 60 * options.minutes
    model: list[Any] = []

    def made() -> tuple[Path, nn.Module, Tensor]:
        if not model:
            folder, (config, state) = scratch / extent.name, extent.decoder.build(torch.bfloat16)
            save(folder, config, state, torch.bfloat16)
            plain = load_full_precision(folder, torch.bfloat16, options.device)
            model.extend([folder, plain, random_tokens(config, *extent.windows)])
            write_statistics(plain, model[2], folder / "statistics")
        return tuple(model)  # type: ignore[return-value]

    measured: dict[str, Callable[[], list[dict[str, object]]]] = {
        "fake_quantize": lambda: fake_quantize_rows(extent, options),
        "solver": lambda: solver_rows(extent.name, made()[0], options),
        "evaluation": lambda: evaluation_rows(extent.name, *made(), options),
        "smoke": lambda: smoke_rows(end - time.monotonic(), options, scratch),
    }
    for part in (part for part in PARTS if part in options.parts):
        if time.monotonic() > end:
            yield unmeasured(BENCHMARK, PARTS[part], f"more than {options.minutes:g} minutes")
        else:
            yield from measured[part]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--small", action="store_true", help="shapes that say nothing of speed, to see that all of it runs"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later than this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers/bin/python"),
        help="the Python of llm-compressor (make .venv-peers/.installed)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        rows = [unmeasured(BENCHMARK, PARTS[part], "no CUDA device") for part in options.parts]
    else:
        with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as scratch:
            rows = list(measure(SMALL if options.small else WHOLE, options, Path(scratch)))
    for row in rows:
        show(row)
    record(BENCHMARK, rows, options.results)


if __name__ == "__main__":
    main()
