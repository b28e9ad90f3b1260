"""Fake quantization as one kernel against a copy, which reads the tensor once and writes it once too: the share of the bandwidth that it reaches.

Measured in a process of its own with the allocator settings of the workflow's jobs, so that memory for results is there already. A kernel makes its
result anew, as in a running model, and says whether its input was finite; the copy goes into a tensor that is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from records import timed_row
from turns import medians, run

GOAL = 1 / 0.6  # times of a copy: 60 % of the bandwidth
COPY, CASES = "copy", {"int4 per token, compiled": "int4", "nvfp4, compiled": "nvfp4"}  # name -> preset


def rows_of(benchmark: str, shape: tuple[int, int], device: str, threads: int, repeats: int, log: Path) -> list[dict[str, object]]:
    """One row per case: its kernel on a random bfloat16 tensor of ``shape`` (tokens, n) against a copy of that tensor, taken in turns."""
    command = [sys.executable, __file__, "--shape", *map(str, shape), "--device", device, "--threads", str(threads), "--repeats", str(repeats)]
    told = json.loads(run(command, threads, log).output.splitlines()[-1])
    size = f", {shape[0]} x {shape[1]} bfloat16"
    milliseconds = {name + size: taken for name, taken in told["milliseconds"].items()}
    rates = {name: f"{2 * told['bytes'] / 1e6 / taken:.4g} GB/s" for name, taken in milliseconds.items()}
    return [timed_row(benchmark, name + size, threads, COPY + size, milliseconds, GOAL, device=told["device"], rate=rates[name + size],
                      reference_rate=rates[COPY + size], repeats=repeats) for name in CASES]


def measure(options: argparse.Namespace) -> dict[str, object]:
    """In this process: median milliseconds of the copy and of every case, bytes of the tensor, name of the device.

    Raises :class:`SystemExit` where a kernel does not give the bits of ``fake_quantize``.
    """
    import torch
    from devices import name_of, now

    from quantgrid.compiled import compile_fake_quantize
    from quantgrid.quantizer import activation_scheme, fake_quantize

    torch.set_num_threads(options.threads)
    x = torch.randn(options.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(options.device)
    target = torch.empty_like(x)
    calls = {COPY: lambda: target.copy_(x)}
    for name, preset in CASES.items():
        scheme = activation_scheme(preset)
        kernel = compile_fake_quantize(scheme)
        if different := (kernel(x).view(torch.int16) != fake_quantize(x, scheme).view(torch.int16)).sum().item():
            raise SystemExit(f"{name}: {different} of {x.numel()} values are not those of fake_quantize on {name_of(x.device)}")
        calls[name] = partial(kernel, x)
    return {"milliseconds": medians(calls, options.repeats, partial(now, x.device)), "bytes": x.nbytes, "device": name_of(x.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, required=True)
    parser.add_argument("--device", required=True)
    for name in ("threads", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
