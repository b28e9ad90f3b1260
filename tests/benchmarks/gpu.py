"""quantgrid on a GPU: ``python tests/benchmarks/gpu.py`` (``make bench BENCH=gpu``), on random
Llamas of the layer shapes of 1B and 8B.

- GPTQ, INT4 in groups of 128, of every linear, per layer: quantgrid's solver against
  llm-compressor's (``gptq_solvers.py``, each in a process with a separate environment; the Hessians
  come from calibration of the random model);
- tokens of a perplexity run per second: rounded to nearest, against the bfloat16 model of
  transformers, both through quantgrid's ``evaluate``.

Where there is no CUDA device the rows say so. ``--device cpu --small`` takes the same way on a CPU
with shapes of no interest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
from devices import name_of, now  # noqa: E402
from random_models import write_statistics  # noqa: E402
from records import record, show, timed_row, unmeasured  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from turns import medians, run  # noqa: E402

from quantgrid.calibration.layers import DecoderFolder  # noqa: E402
from quantgrid.evaluation.perplexity import evaluate, final_hidden  # noqa: E402
from quantgrid.inference.transform import Transform  # noqa: E402
from quantgrid.mitigations.methods.rtn import rtn  # noqa: E402
from quantgrid.models.lm_head import head_of  # noqa: E402
from quantgrid.quantization.cached import Recipe, quantize_decoder  # noqa: E402
from quantgrid.quantization.checkpoints import load_full_precision, load_quantized, save_quantized  # noqa: E402
from quantgrid.schemes.cell_schemes import CellSchemes  # noqa: E402
from quantgrid.schemes.granularities import cell_schemes  # noqa: E402
from tiny_decoders import Case, random_tokens, save  # noqa: E402

BENCHMARK, PARTS = "gpu", ("GPTQ of a layer", "tokens of a perplexity run")
GROUP, DAMPING, BATCH = 128, 0.01, 4
LLAMA = partial(Case, "LlamaForCausalLM")
EVALUATED = {
    "int4": ("channel", 1 / 0.8),
    "nvfp4": ("group-16", 1 / 0.6),
}  # preset -> granularity, highest ratio of times that is the goal


@dataclass(frozen=True)
class Extent:
    """Extent of the measurements: random decoders by name, and the ``windows`` (count, tokens) that
    they run on."""

    decoders: dict[str, Case]
    windows: tuple[int, int]


WHOLE = Extent(
    {
        "Llama-3.2-1B": LLAMA(
            hidden=2048, intermediate=8192, layers=4, heads=32, kv_heads=8, head_dim=64, vocab=128256, tied=True
        ),
        "Llama-3.1-8B": LLAMA(
            hidden=4096, intermediate=14336, layers=4, heads=32, kv_heads=8, head_dim=128, vocab=128256
        ),
    },
    windows=(16, 2048),
)
SMALL = Extent(
    {"small": LLAMA(hidden=128, intermediate=256, layers=2, heads=2, kv_heads=1, head_dim=64, vocab=61)},
    windows=(8, 32),
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
    done = quantize_decoder(DecoderFolder(folder), Recipe(Transform([]), schemes, rtn, str(folder / "statistics")))
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


def measure(extent: Extent, options: argparse.Namespace, scratch: Path) -> list[dict[str, object]]:
    solved, evaluated = [], []
    for name, case in extent.decoders.items():
        folder, (config, state) = scratch / name, case.build(torch.bfloat16)
        save(folder, config, state, torch.bfloat16)
        del state
        windows, plain = (
            random_tokens(config, *extent.windows),
            load_full_precision(folder, torch.bfloat16, options.device),
        )
        write_statistics(plain, windows, folder / "statistics")
        solved += solver_rows(name, folder, options)
        evaluated += evaluation_rows(name, folder, plain, windows, options)
    return [*solved, *evaluated]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--small", action="store_true", help="shapes that say nothing of speed, to see that all of it runs"
    )
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
        rows = [unmeasured(BENCHMARK, part, "no CUDA device") for part in PARTS]
    else:
        with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as scratch:
            rows = measure(SMALL if options.small else WHOLE, options, Path(scratch))
    for row in rows:
        show(row)
    record(BENCHMARK, rows, options.results)


if __name__ == "__main__":
    main()
