"""Trainings on the simulated device, in a process of their own.

autograd counts the devices at the first backward pass of a process, so the simulated one has to be
registered before it. ``FakeTensorMode`` on ``cuda`` cannot do this check: a backward pass on it ends a
process whose torch was built without CUDA, and its tensors have no values.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import geoopt
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import simulated_device
from learned_cases import Given, recipe, recipe_of, start
from quantgrid.calibration.sensitivity import measure_sensitivities
from quantgrid.config import registry
from quantgrid.ground.storage import write_json
from quantgrid.learning import network, stored_activations, straight_through, transformed
from quantgrid.quantization.checkpoints import load_full_precision
from simulated_device import NAME, SimTensor, moved
from tiny_decoders import VARIED

WINDOWS = 4
SHORT = {"steps": 2, "batch_size": 2, "held_out": 1, "checks": 1}  # fewer windows than a config may hold out
FEW = 32  # stored tokens of a site, fewer than a training asks for
# function whose result a planted defect moves to the CPU, by kind of defect
PLANTED: dict[str, tuple[Any, str]] = {
    "inputs of a transform": (network.Network, "embedded"),
    "inputs of a mitigation": (transformed.TransformedModel, "embedded"),
    "gradient of rounding": (straight_through, "range_ends"),
}


@dataclass(frozen=True)
class Outcome:
    """Losses of one training (or other numbers of it), the sums of each tensor that it leaves and of its
    magnitudes, and the devices of these tensors."""

    losses: list[float]
    tensors: dict[str, list[float]]
    devices: set[str]


class Point(SimTensor, geoopt.ManifoldParameter):
    """Learned rotation on the simulated device: geoopt's own class takes no tensor of another class."""

    @staticmethod
    def __new__(cls, start: Tensor, manifold: Any = None, requires_grad: bool = True) -> Tensor:
        if not isinstance(start, SimTensor):
            return ORIGINAL(start, manifold=manifold, requires_grad=requires_grad)
        made = SimTensor.__new__(cls, start.held)
        made.manifold = manifold
        return made.requires_grad_(requires_grad)


ORIGINAL = geoopt.ManifoldParameter


class FromNumbers(TorchFunctionMode):
    """Tensors from Python numbers, and indices from lists, made on the CPU and moved: torch makes them without
    asking a backend in Python."""

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if function is torch.tensor and torch.device(options.get("device") or "cpu").type == NAME:
            device = options.pop("device")
            return torch.tensor(*arguments, **options).to(device)
        if function is Tensor.__getitem__ and isinstance(arguments[0], SimTensor) and isinstance(arguments[1], list):
            return arguments[0][torch.tensor(arguments[1]).to(arguments[0].device)]
        return function(*arguments, **options)


def begin() -> None:
    """Prepare a process that has made no backward pass yet."""
    simulated_device.register()
    geoopt.ManifoldParameter = Point
    stored_activations.LEAST = FEW


@contextmanager
def on_device(planted: str | None) -> Iterator[None]:
    """Run on the simulated device as on the CPU, with the defect ``planted``, if any."""
    with pytest.MonkeyPatch.context() as patched, FromNumbers(), sdpa_kernel(SDPBackend.MATH):
        if planted:
            of, name = PLANTED[planted]
            original = getattr(of, name)
            patched.setattr(of, name, lambda *given: moved(original(*given), "cpu"))
        yield


@cache
def decoder(folder: Path) -> Given:
    """Small decoder in ``folder`` that every training of this process reads."""
    return Given.make(folder, VARIED[1], windows=WINDOWS)


def short(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a training, made short."""
    return {name: SHORT.get(name, value) for name, value in options.items()}


def transform(folder: Path, device: str, name: str, options: Mapping[str, Any]) -> Outcome:
    """Train a learned transform."""
    made, (module, given) = decoder(folder), recipe(name, **options)
    context = made.context(device=device, statistics_file=made.folder / "statistics")
    done = module.learn(start(made, name, **options), context, **short(given))
    return outcome(done.losses, done.ends, done.transform.parameters)


def mitigation(folder: Path, device: str, name: str, options: Mapping[str, Any]) -> Outcome:
    """Train a mitigation."""
    made, method = decoder(folder), registry.method("mitigations", name)
    given = short(method.resolve({"method": name, **options}, name)["options"])
    train = getattr(registry.load("mitigations", name), name)
    weighted = {"sensitivities_file": sensitivities_file(folder)} if given.get("error") == "fisher" else {}
    done = train(recipe_of(made), made.context(device=device, **weighted), seed=0, **given)
    return outcome(done.losses, done.ends, done.quantized.content.tensors)


@cache
def sensitivities_file(folder: Path) -> Path:
    """Sensitivities of the decoder in ``folder``, measured on the CPU."""
    made = decoder(folder)
    found = measure_sensitivities(load_full_precision(made.folder, torch.float32), made.tokens[:2])
    path = made.folder / "sensitivities.json"
    write_json(path, {"status": "ok", "channels": found.channels.tolist()})
    return path


def sensitivity(folder: Path, device: str, name: str, options: Mapping[str, Any]) -> Outcome:
    """Measure the sensitivities of all linears by gradients."""
    made = decoder(folder)
    model = load_full_precision(made.folder, torch.float32, device)
    found = measure_sensitivities(model, made.tokens[:2])
    linears = [value for entry in found.linears.values() for value in entry.values()]
    return Outcome([*linears, *found.channels.flatten().tolist()], {}, {"cpu"})


def outcome(losses: str, ends: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> Outcome:
    """Outcome of a training with the table ``losses`` of its steps and the losses ``ends`` of its parts."""
    rows = list(csv.DictReader(io.StringIO(losses)))
    numbers = [float(row["loss"]) for row in rows] + [end[side] for end in ends.values() for side in ("start", "end")]
    kept = {key: tensor.detach().cpu().double().flatten() for key, tensor in tensors.items()}
    sums = {key: [tensor.sum().item(), tensor.abs().sum().item()] for key, tensor in kept.items()}
    return Outcome(numbers, sums, {tensor.device.type for tensor in tensors.values()})


def run(what: str, folder: Path, device: str, name: str, options: Mapping[str, Any], planted: str | None) -> Outcome:
    """Outcome of one of the functions above."""
    with on_device(planted):
        return {"transform": transform, "mitigation": mitigation, "sensitivity": sensitivity}[what](
            folder, device, name, options
        )


# torch's own kernels, oneDNN and MKL
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@contextmanager
def process() -> Iterator[Callable[..., Outcome]]:
    """:func:`run` in a fresh process, whose exceptions are raised here.

    The process uses AVX2 at most: kernels for AVX-512 sum in an order that differs between devices, and Adam makes
    a whole step of a gradient that is rounding noise.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), begin) as pool:
        with patch.dict(os.environ, AVX2):
            pool.submit(int).result()  # starts the process
        yield lambda *given: pool.submit(run, *given).result()
