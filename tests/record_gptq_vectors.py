"""Record what llm-compressor's GPTQ makes of one weight and one second moment, as
``tests/data/gptq-vectors.safetensors``.

In a separate environment, with torch and transformers (the tests need neither package):

    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0
    PYTHONPATH=scripts python tests/record_gptq_vectors.py

Only ``llmcompressor.modifiers.gptq.gptq_quantize.quantize_weight`` runs, the solver itself; the
package's own ``__init__``, which imports all of its dependencies, is stepped over. Scales and zero
points are ours, found before the first rounding, as its observers would.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

from quantgrid.quantizer import find_parameters
from quantgrid.schemes import QuantScheme, scheme

TARGET = Path(__file__).parent / "data" / "gptq-vectors.safetensors"
SHAPE, TOKENS = (64, 192), 1024


def solver():
    """``quantize_weight`` and ``QuantizationArgs``, without the initialisation of the packages
    around the former."""
    folder = Path(PathFinder.find_spec("llmcompressor").origin).parent
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    return quantize_weight, QuantizationArgs


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """(weight float32, second moment float32): heavy-tailed weights, correlated inputs with a few
    large channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * torch.randn(SHAPE, generator=generator).exp()
    mixing = torch.eye(SHAPE[1]) + torch.randn(SHAPE[1], SHAPE[1], generator=generator) / SHAPE[1] ** 0.5
    x = torch.randn(TOKENS, SHAPE[1], generator=generator) @ mixing * (1 + 9 * (torch.arange(SHAPE[1]) % 37 == 5))
    return weight, x.mT @ x / TOKENS


def solve(weight: torch.Tensor, moment: torch.Tensor, of_scheme: QuantScheme, ordered: bool) -> torch.Tensor:
    """The toolkit's codes (m, n) int8, of its range -8 to 7: its rounded weight in units of the
    scales, plus its zero points."""
    quantize_weight, arguments = solver()
    parameters, grouped = find_parameters(weight, of_scheme), of_scheme.granularity == "group"
    zero = (
        torch.zeros_like(parameters.scale) if parameters.zero_point is None else parameters.zero_point.float() - 8
    )  # theirs run from -8 to 7
    wanted = arguments(
        num_bits=4,
        type="int",
        symmetric=of_scheme.symmetric,
        strategy="group" if grouped else "channel",
        group_size=of_scheme.group_size,
        actorder="static" if ordered else None,
    )
    done, _, fallback = quantize_weight(
        weight[None].clone(), moment[None].clone(), parameters.scale[None], zero[None], None, wanted
    )
    if fallback.any():
        raise SystemExit("the toolkit's factorization failed: these vectors would be round to nearest")
    spread = [part.repeat_interleave(weight.shape[1] // part.shape[1], 1) for part in (parameters.scale, zero)]
    return (done[0] / spread[0]).round().add(spread[1]).to(torch.int8)


def main() -> None:
    weight, moment = case()
    found = {"weight": weight, "second_moment": moment}
    schemes = {
        "int4-channel": scheme("int4"),
        "int4-group": scheme("int4", group_size=64),
        "int4-asymmetric-group": scheme("int4_asym", group_size=64),
    }
    for name, of_scheme in schemes.items():
        for ordered in (False, True):
            found[f"{name}.{'ordered' if ordered else 'in-order'}"] = solve(
                weight, moment, of_scheme, ordered
            ).contiguous()
    save_file(found, TARGET)


if __name__ == "__main__":
    main()
