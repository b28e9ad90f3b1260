"""Cells for the tests of exports: tiny decoders and reference models, quantized and saved with windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from family_models import build, calibrate, some_tokens
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.storage import write_tensors
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.quantization.cached import Recipe, quantize_decoder
from quantgrid.quantization.checkpoints import save_quantized
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.schemes.granularities import cell_schemes

BF16 = {"scale_format": "bf16"}
# formats that loaders compute exactly: name -> entry of a config
SERVED: dict[str, dict[str, Any]] = {
    **{f"w{bits}a16": {"preset": f"int{bits}", "weight": BF16, "activation": None} for bits in range(2, 9)},
    "w8a8": {"preset": "w8a8", "weight": BF16, "activation": {"qmax": 127.5}},
    "w4a8": {"preset": "w4a8", "weight": BF16, "activation": {"qmax": 127.5}},
    "w4a4": {"preset": "int4_sym", "weight": BF16, "activation": {"qmax": 7.5}},
    "fp8": {"preset": "fp8"},
    "mxfp4": {"preset": "mxfp4", "activation": {"scale_rule": "even"}},
    "mxfp4_weights": {"preset": "mxfp4", "activation": None},
    "mxfp6": {"preset": "mxfp6", "activation": {"scale_rule": "even"}},
    "mxfp8": {"preset": "mxfp8", "activation": {"scale_rule": "rceil"}},
}
# commands of docs/how-to/deploy.md, run by tests/workflow/test_servers.py
TRANSFORMERS_SERVE = "serve {folder} --host 127.0.0.1 --port {port} --device cpu"
UNTIL_INPUT_ENDS = """
import sys

print(server.listening_address, flush=True)
sys.stdin.read()  # answers until the input ends
"""
BLOCKS = ("mxfp4", "mxfp4_weights", "mxfp6", "mxfp8", "nvfp4")


@dataclass(frozen=True)
class Source:
    """A model folder, calibration statistics, and token windows in a file."""

    model: Path
    statistics: Path
    windows: Path

    @classmethod
    def of(cls, model: Path, folder: Path, tokens: Tensor) -> Source:
        """Calibrate ``model`` on ``tokens`` (windows, tokens), which are the windows too."""
        folder.mkdir(parents=True, exist_ok=True)
        statistics = calibrate(model, folder / "statistics.safetensors", tokens)
        windows = folder / "windows.safetensors"
        write_tensors(windows, {"windows": tokens.int()}, {})
        return cls(model, statistics, windows)

    @classmethod
    def tiny(cls, architecture: str, folder: Path, **settings: Any) -> Source:
        """A tiny model of a family in bfloat16 values; sizes are multiples of 64."""
        sizes = {"intermediate_size": 128, **settings}
        model = build(architecture, folder / "model", **sizes)
        in_bfloat16(model)
        return cls.of(model, folder, some_tokens(2, 24))


def in_bfloat16(model: Path) -> None:
    """Round the values of a model folder to bfloat16."""
    from safetensors.torch import load_file, save_file

    for path in model.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def cell(
    source: Source,
    folder: Path,
    entry: Mapping[str, Any],
    granularity: str = "channel",
    transform: Sequence[Any] = (),
    mitigation: Callable[..., Any] = rtn,
) -> Path:
    """Quantize the model in the format ``entry``; returns the folder of the packed checkpoint."""
    decoder = DecoderFolder(source.model)
    schemes = CellSchemes.from_dict(cell_schemes(entry, granularity, "test", decoder.shape.head_dim))
    fitted = fit(list(transform), decoder, source.statistics)
    done = quantize_decoder(decoder, Recipe(fitted, schemes, mitigation if schemes.weight else None, source.statistics))
    folder.mkdir(parents=True, exist_ok=True)
    record = {"axes": {"transform": "none", "mitigation": "rtn", "format": "test", "granularity": granularity}}
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", record)
    return folder


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits (windows, tokens, vocabulary) in float32."""
    with torch.no_grad():
        return model(tokens).logits.float()
