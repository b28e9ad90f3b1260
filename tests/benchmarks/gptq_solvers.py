"""The GPTQ solver alone, quantgrid's or llm-compressor's, on every linear of a model: one side of what ``gptq.py`` times.

Both solve the same problems: weights and second moments as quantgrid's files hold them, scales from quantgrid's ``find_parameters``. Each is called
as its own package does it: quantgrid's on all layers of a chunk at once, llm-compressor's on one linear after another (its batches
have the size 1 on a CPU). Timed are the calls alone, not what brings their inputs together. quantgrid's includes finding the scales and writing
integer codes; llm-compressor's gets the scales and returns rounded weights. Prints JSON: seconds, how many linears, and the mean relative error of
their outputs, by which the two can be held against each other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from turns import solver_options  # noqa: E402

from quantgrid.architecture import SITES  # noqa: E402
from quantgrid.decoders import DecoderFolder  # noqa: E402
from quantgrid.mitigations.gptq import gptq  # noqa: E402
from quantgrid.quantization import chunks  # noqa: E402
from quantgrid.quantizer import QuantScheme, find_parameters, scheme  # noqa: E402
from quantgrid.statistics import SiteStatistics, stack  # noqa: E402
from quantgrid.transforms.composition import layer_state  # noqa: E402

# (weight (layers, m, n), statistics of its site, scheme, damping) -> (weight that the model computes with, seconds)
Solver = Callable[[Tensor, SiteStatistics, QuantScheme, float], tuple[Tensor, float]]


def own(weight: Tensor, statistics: SiteStatistics, of_scheme: QuantScheme, damping: float) -> tuple[Tensor, float]:
    begun = time.perf_counter()
    solved = gptq(weight, statistics, of_scheme, damping=damping)
    seconds = time.perf_counter() - begun
    return solved.dequantized(), seconds


def toolkit() -> Solver:
    """llm-compressor's ``quantize_weight``, which takes its inputs to pieces: it gets copies, made before the clock starts."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    def solve(weight: Tensor, statistics: SiteStatistics, of_scheme: QuantScheme, damping: float) -> tuple[Tensor, float]:
        wanted = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=of_scheme.group_size)
        done, seconds = [], 0.0
        for matrix, moment in zip(weight, statistics.second_moment):
            scale = find_parameters(matrix, of_scheme).scale[None]
            arguments = matrix[None].clone(), moment[None].float().clone(), scale, torch.zeros_like(scale)
            begun = time.perf_counter()
            found, _, fallback = quantize_weight(*arguments, None, wanted, percdamp=damping)
            seconds += time.perf_counter() - begun
            if fallback.any():
                raise SystemExit("llm-compressor's factorization failed: a weight was rounded to nearest")
            done.append(found[0])
        return torch.stack(done), seconds

    return solve


def output_errors(weight: Tensor, used: Tensor, moment: Tensor) -> Tensor:
    """Squared error of the outputs relative to them, per layer."""
    error, moment = weight - used, moment.float()
    return ((error @ moment) * error).sum((-1, -2)) / ((weight @ moment) * weight).sum((-1, -2))


def main() -> None:
    parser = solver_options(__doc__.splitlines()[0], "model", "statistics")
    parser.add_argument("--solver", choices=("quantgrid", "llm-compressor"), required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    solve: Solver = own if options.solver == "quantgrid" else toolkit()
    decoder, of_scheme = DecoderFolder(options.model), scheme("int4", group_size=options.group_size)
    solve(torch.randn(1, 64, 128), _warm_up(128), scheme("int4", group_size=64), 0.01)
    seconds, errors = 0.0, []
    with torch.no_grad():
        for group in chunks(decoder):
            layers = [layer_state(decoder, index, options.statistics) for index in group]
            for site, linears in SITES.items():
                statistics = stack([layer.statistics[site] for layer in layers])
                for linear in linears:
                    weight = torch.stack([layer.weights[linear].float() for layer in layers])
                    used, taken = solve(weight, statistics, of_scheme, options.damping)
                    seconds += taken
                    errors += output_errors(weight, used, statistics.second_moment).tolist()
    print(json.dumps({"seconds": seconds, "linears": len(errors), "output_error": sum(errors) / len(errors)}))


def _warm_up(columns: int) -> SiteStatistics:
    """Statistics of ``columns`` independent inputs, of one layer: the first call of anything is not counted."""
    vector = torch.ones(1, columns)
    return SiteStatistics(1, vector, torch.eye(columns)[None], vector, vector, vector, vector[None])


if __name__ == "__main__":
    main()
