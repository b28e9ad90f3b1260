"""The GPTQ solver alone, quantgrid's or llm-compressor's, on every linear of a model: one side of
what ``gptq.py`` times.

Both solve the same problems: weights and second moments as quantgrid's files hold them, scales from
quantgrid's ``find_parameters``. Each is called as its own package does it: quantgrid's on all
layers of a chunk at once, llm-compressor's on one linear after another or, on a GPU, on those of a
layer that have one shape. Timed are the calls alone, not what brings their inputs together, and not
those on the first layer that warm up. quantgrid's includes finding the scales and writing integer
codes; llm-compressor's gets the scales and returns rounded weights. Prints JSON: seconds, how many
layers and linears, and the mean relative error of their outputs, by which the two can be held
against each other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from devices import now  # noqa: E402
from torch import Tensor  # noqa: E402
from turns import solver_options  # noqa: E402

from quantgrid.calibration.layers import DecoderFolder  # noqa: E402
from quantgrid.calibration.statistics import SiteStatistics, stack  # noqa: E402
from quantgrid.inference.transform import layer_state  # noqa: E402
from quantgrid.machine.devices import Placement  # noqa: E402
from quantgrid.mitigations.methods.gptq import gptq  # noqa: E402
from quantgrid.models.plans import LINEARS, SITE_OF, SITES  # noqa: E402
from quantgrid.quantization.grouping import chunks  # noqa: E402
from quantgrid.quantizer import find_parameters  # noqa: E402
from quantgrid.schemes import QuantScheme, scheme  # noqa: E402

Weights = dict[str, Tensor]  # by linear (layers, m, n)
Statistics = dict[str, SiteStatistics]  # by site
# Problems, their scheme and damping -> (weights that the model computes with, seconds)
Solver = Callable[[Weights, Statistics, QuantScheme, float], tuple[Weights, float]]


def own(weights: Weights, statistics: Statistics, of_scheme: QuantScheme, damping: float) -> tuple[Weights, float]:
    device = weights[LINEARS[0]].device
    begun = now(device)
    solved = {
        linear: gptq(weight, statistics[SITE_OF[linear]], of_scheme, damping=damping)
        for linear, weight in weights.items()
    }
    seconds = now(device) - begun
    return {linear: compensated.dequantized() for linear, compensated in solved.items()}, seconds


def batches(weights: Weights) -> list[list[str]]:
    """The linears of a layer that llm-compressor solves in one call: on a GPU those of one shape,
    elsewhere each by itself."""
    found: dict[object, list[str]] = {}
    for linear, weight in weights.items():
        found.setdefault(weight.shape if weight.is_cuda else linear, []).append(linear)
    return list(found.values())


def toolkit() -> Solver:
    """llm-compressor's ``quantize_weight``, which takes its inputs to pieces: it gets copies, made
    before the clock starts."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    def solve(
        weights: Weights, statistics: Statistics, of_scheme: QuantScheme, damping: float
    ) -> tuple[Weights, float]:
        wanted = QuantizationArgs(
            num_bits=4, type="int", symmetric=True, strategy="group", group_size=of_scheme.group_size
        )
        used, seconds = {linear: torch.empty_like(weight) for linear, weight in weights.items()}, 0.0
        for layer in range(len(weights[LINEARS[0]])):
            for linears in batches(weights):
                matrices = torch.stack([weights[linear][layer] for linear in linears])
                moments = torch.stack([statistics[SITE_OF[linear]].second_moment[layer].float() for linear in linears])
                scales = torch.stack([find_parameters(matrix, of_scheme).scale for matrix in matrices])
                zeros = torch.zeros_like(scales)
                begun = now(matrices.device)
                found, _, fallback = quantize_weight(matrices, moments, scales, zeros, None, wanted, percdamp=damping)
                seconds += now(matrices.device) - begun
                if fallback.any():
                    raise SystemExit("llm-compressor's factorization failed: a weight was rounded to nearest")
                for linear, rounded in zip(linears, found):
                    used[linear][layer] = rounded
        return used, seconds

    return solve


def problems(decoder: DecoderFolder, group: range, statistics: str) -> tuple[Weights, Statistics]:
    """The linears of the layers ``group`` and the second moments of their inputs."""
    layers = [layer_state(decoder, index, statistics) for index in group]
    return (
        {linear: torch.stack([layer.weights[linear].float() for layer in layers]) for linear in LINEARS},
        {site: stack([layer.statistics[site] for layer in layers]) for site in SITES},
    )


def output_errors(weight: Tensor, used: Tensor, moment: Tensor) -> Tensor:
    """Squared error of the outputs relative to them, per layer."""
    error, moment = weight - used, moment.float()
    return ((error @ moment) * error).sum((-1, -2)) / ((weight @ moment) * weight).sum((-1, -2))


def main() -> None:
    parser = solver_options(__doc__.splitlines()[0], "model", "statistics")
    parser.add_argument("--solver", choices=("quantgrid", "llm-compressor"), required=True)
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="where the problems are solved"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    solve: Solver = own if options.solver == "quantgrid" else toolkit()
    place = Placement(options.device)
    decoder, of_scheme = DecoderFolder(options.model, placement=place), scheme("int4", group_size=options.group_size)
    seconds, errors = 0.0, []
    with torch.no_grad():
        solve(*problems(decoder, range(1), options.statistics), of_scheme, options.damping)
        for group in chunks(decoder.shape, place.budget()):
            weights, statistics = problems(decoder, group, options.statistics)
            used, taken = solve(weights, statistics, of_scheme, options.damping)
            seconds += taken
            errors += [
                error
                for linear, weight in weights.items()
                for error in output_errors(weight, used[linear], statistics[SITE_OF[linear]].second_moment).tolist()
            ]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "layers": decoder.shape.layers,
                "linears": len(errors),
                "output_error": sum(errors) / len(errors),
            }
        )
    )


if __name__ == "__main__":
    main()
