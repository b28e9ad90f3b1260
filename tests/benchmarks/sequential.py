"""Memory of sequential propagation: ``python tests/benchmarks/sequential.py`` (``make bench
BENCH=sequential``).

``quantize_sequentially`` (GPTQ, INT4 in groups of 64) of random Llamas of one width and 4, 8 and 16
layers, each in a fresh process, and for comparison a pass of the same windows through the whole
model in memory. Both are float32. What a layer more adds to the peak of the former has to be far
below the layer itself: its packed codes are kept until the checkpoint is written, its weights and
Hessians are not. The goal is a quarter. The workflow lets a job keep the memory that it frees,
which is faster and leaves gaps; that is measured separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from records import record, row, show  # noqa: E402
from turns import ALLOCATOR, peak_mb, run  # noqa: E402

BENCHMARK, GOAL, GROUP = "sequential", 0.25, 64
SEQUENTIAL, KEEPING, WHOLE = (
    "sequential propagation",
    "sequential propagation, freed memory kept",
    "whole model in memory",
)


def make(folder: Path, layers: int, hidden: int, windows: int, tokens: int) -> None:
    """A random Llama of ``layers`` layers in ``folder``, in float32, with windows and the
    statistics of the model on them."""
    import torch
    from random_models import write_statistics

    from quantgrid.ground.storage import write_tensors
    from quantgrid.quantization.checkpoints import load_full_precision
    from tiny_decoders import Case, random_tokens, save

    heads = hidden // 64
    config, state = Case("LlamaForCausalLM", hidden, hidden * 8 // 3, layers, heads, heads, 64, vocab=512).build(
        torch.float32
    )
    save(folder, config, state)
    drawn = random_tokens(config, windows, tokens)
    write_statistics(load_full_precision(folder), drawn, folder / "statistics")
    write_tensors(folder / "windows", {"windows": drawn})


def sequential(folder: Path) -> None:
    from quantgrid.calibration.layers import DecoderFolder
    from quantgrid.ground.storage import read_tensors
    from quantgrid.inference.transform import Transform
    from quantgrid.mitigations.methods.gptq import gptq
    from quantgrid.quantization.cached import Recipe
    from quantgrid.quantization.sequential import Sequential, quantize_sequentially
    from quantgrid.schemes import scheme
    from quantgrid.schemes.cell_schemes import CellSchemes

    recipe = Recipe(
        Transform([]),
        CellSchemes(scheme("int4", group_size=GROUP)),
        partial(gptq, damping=0.01),
        str(folder / "statistics"),
    )
    quantize_sequentially(DecoderFolder(folder), recipe, Sequential(read_tensors(folder / "windows")["windows"]))


def whole(folder: Path) -> None:
    import torch

    from quantgrid.ground.storage import read_tensors
    from quantgrid.quantization.checkpoints import load_full_precision

    model = load_full_precision(folder)
    with torch.inference_mode():
        for window in read_tensors(folder / "windows")["windows"]:
            model(window[None], use_cache=False)


def in_process(side: str, folder: Path, threads: int) -> None:
    """One side in this process; prints its peak in MB."""
    import torch

    torch.set_num_threads(threads)
    {SEQUENTIAL: sequential, KEEPING: sequential, WHOLE: whole}[side](folder)
    print(json.dumps({"peak_mb": peak_mb()}))


def layer_mb(hidden: int) -> float:
    """Linears of one decoder layer in float32."""
    return (4 * hidden**2 + 3 * hidden * (hidden * 8 // 3)) * 4 / 2**20


def slope(peaks: dict[int, float]) -> float:
    """MB per layer, by least squares over the numbers of layers."""
    return statistics.linear_regression(list(peaks), list(peaks.values())).slope


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, dict[int, float]]:
    """Peaks in MB by side and number of layers: medians, the sides in turns."""
    peaks: dict[str, dict[int, float]] = {SEQUENTIAL: {}, KEEPING: {}, WHOLE: {}}
    for layers in options.layers:
        folder, log = scratch / str(layers), scratch / "log"
        folder.mkdir()
        made = [
            "--make",
            str(layers),
            "--hidden",
            str(options.hidden),
            "--windows",
            str(options.windows),
            "--tokens",
            str(options.tokens),
        ]
        run([sys.executable, __file__, "--folder", str(folder), *made], options.threads, log)
        command = [sys.executable, __file__, "--folder", str(folder), "--threads", str(options.threads), "--side"]
        taken: dict[str, list[float]] = {side: [] for side in peaks}
        for _ in range(options.repeats):
            for side in peaks:
                done = run([*command, side], options.threads, log, ALLOCATOR if side == KEEPING else {})
                taken[side].append(json.loads(done.output.splitlines()[-1])["peak_mb"])
        for side in peaks:
            peaks[side][layers] = statistics.median(taken[side])
            print(f"{layers} layers, {side}: {peaks[side][layers]:.0f} MB", file=sys.stderr)
    return peaks


def rows_of(peaks: dict[str, dict[int, float]], options: argparse.Namespace) -> list[dict[str, object]]:
    shape, size = f"hidden size {options.hidden}", layer_mb(options.hidden)
    rows = [
        row(
            BENCHMARK,
            f"{SEQUENTIAL}, {layers} layers, {shape}",
            options.threads,
            WHOLE,
            peak / peaks[WHOLE][layers],
            None,
            peak_mb=f"{peak:.0f}",
            reference_peak_mb=f"{peaks[WHOLE][layers]:.0f}",
            repeats=options.repeats,
        )
        for layers, peak in peaks[SEQUENTIAL].items()
    ]
    for side, goal in ((SEQUENTIAL, GOAL), (KEEPING, None), (WHOLE, None)):
        growth = slope(peaks[side])
        rows.append(
            row(
                BENCHMARK,
                f"{side}, growth per layer, {shape}",
                options.threads,
                "linears of a layer in float32",
                growth / size,
                goal,
                peak_mb=f"{growth:.1f}",
                reference_peak_mb=f"{size:.1f}",
                repeats=options.repeats,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of benchmarks.csv and .md")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=960, help="a multiple of 192, so that groups of 64 fit")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    # what this file tells itself in another process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=(SEQUENTIAL, KEEPING, WHOLE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.folder, options.make, options.hidden, options.windows, options.tokens)
    elif options.side:
        in_process(options.side, options.folder, options.threads)
    else:
        with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as scratch:
            peaks = measure(options, Path(scratch))
        rows = rows_of(peaks, options)
        for each in rows:
            show(each)
        record(BENCHMARK, rows, options.results)


if __name__ == "__main__":
    main()
