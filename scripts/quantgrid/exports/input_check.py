"""Inputs of linears as a loader rounds them, against those of the cell, on equal inputs.

Divergences of logits cannot show whether a loader rounds inputs at all: one tie in an early layer
costs as much. So every linear of the loaded model gets the input that it has in the cell, and what
it multiplies is compared with the rounded input of the cell, element by element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..calibration.collect import advance, layer_inputs
from ..calibration.streaming import streamed
from ..ground.errors import ConfigError
from ..inference.linear import QuantizedLinear
from ..models.plans import LAYER_PREFIX, LayerPlan
from ..models.shapes import ModelShape
from ..quantization.checkpoints import PackedCheckpoint

TOLERANCE = 2**-7  # relative, of equal codes: more than scales in bfloat16, or limits of 127 and 127.5, differ
# accepted rounding errors, loader to cell: 0.70 to 1.05 measured; 0 unrounded, 2 with a bit less, 0.5 with one more
ERROR_RATIO = (0.6, 1.5)
SHARE, RARE_SHARE = 0.3, 1e-3  # of elements: at most 0.15 measured (limits of 127 and 127.5); where ties alone differ
RARE_KL = 1e-4  # nats per token up to which a verdict accepts ties alone
OUTPUT_ERROR = 2**-6  # relative, of products with equal inputs: weights rounded to 16 bits have 2^-9
_ADAPTED = "base_model.model."  # names below a PEFT model


@dataclass(frozen=True)
class InputsChecked:
    """Comparison of rounded inputs over ``linears``: the worst of each figure.

    ``differing`` is the share of elements that differ, of which ``differing_accepted`` is accepted.
    ``least_error`` and ``largest_error`` are rounding errors (root mean square) of the loader over
    those of the cell, ``output_error`` the relative error of products with the loader's own inputs.
    ``unrounded`` linears have no enabled scheme for their input.
    """

    linears: int
    differing: float
    differing_accepted: float
    least_error: float
    largest_error: float
    output_error: float
    unrounded: int

    @property
    def is_accepted(self) -> bool:
        """Check all bounds; NaN is never accepted."""
        least, largest = ERROR_RATIO
        return (
            self.unrounded == 0
            and self.differing <= self.differing_accepted
            and least <= self.least_error
            and self.largest_error <= largest
            and self.output_error <= OUTPUT_ERROR
        )

    def text(self) -> str:
        """One line for the card and for messages."""
        return (
            f"rounded inputs of {self.linears} linears, on equal inputs: at most {self.differing:.3%} of the elements "
            f"differ (accepted: {self.differing_accepted:.3%}), rounding errors are {self.least_error:.3f} to "
            f"{self.largest_error:.3f} times those of the cell, {self.unrounded} linears do not round"
        )


def share_accepted(kl: float) -> float:
    """Share of elements that may differ under a verdict that accepts ``kl`` nats per token."""
    return SHARE if kl > RARE_KL else RARE_SHARE if kl else 0.0


@torch.no_grad()
def compare_inputs(source: PackedCheckpoint, loaded: nn.Module, tokens: Tensor, accepted: float) -> InputsChecked:
    """Compare all linears of ``loaded`` that have a rounded input in the cell, on ``tokens`` (windows,
    window). ``loaded`` has made a pass before: weights are decompressed then.

    ``accepted`` is the share of elements that may differ. Raises :class:`ConfigError` if a linear is
    missing.
    """
    modules = {name.removeprefix(_ADAPTED): module for name, module in loaded.named_modules()}
    model, rows = streamed(source), []
    hidden, arguments = layer_inputs(model, tokens)
    for index, layer in enumerate(model.model.layers):
        plan = source.shape.plan(index)
        for role in plan.linears:
            own = layer.get_submodule(plan.modules[role])
            if source.is_rounded(role) and own.site_input.rounding is not None:
                name, begin = place_of(source.shape, plan, index, role)
                if name not in modules:
                    raise ConfigError(f"the loaded model has no linear {name}")
                own.register_forward_pre_hook(partial(_record, rows, modules[name], begin))
        advance(layer, hidden, arguments[index])
    figures = torch.tensor(rows, dtype=torch.float64)
    worst = figures.amax(0).tolist()
    unrounded = int(figures[:, 3].sum())
    return InputsChecked(
        len(rows) // len(tokens), worst[0], accepted, figures[:, 1].amin().item(), worst[1], worst[2], unrounded
    )


def place_of(shape: ModelShape, plan: LayerPlan, index: int, role: str) -> tuple[str, int]:
    """Name of the architecture's linear that holds ``role`` in layer ``index``, and its first row there."""
    prefix = LAYER_PREFIX.format(layer=index)
    place = plan.stored.get(f"{plan.modules[role]}.weight")
    if place is None:
        return prefix + plan.modules[role], 0
    before = place.parts[: place.parts.index(place.part)] if place.part else ()
    return prefix + place.name.removesuffix(".weight"), sum(shape.linear_size(part)[0] for part in before)


def _record(
    rows: list[tuple[float, ...]], loaded: nn.Module, begin: int, own: QuantizedLinear, given: tuple[Tensor, ...]
) -> None:
    """Add (share that differs, ratio of errors, error of the product, 1 if it does not round)."""
    exact = own.site_input.transform(given[0])
    wanted = own.site_input.round(exact)
    with _Products() as products:
        made = loaded(given[0])[..., begin : begin + len(own.weight)]
    if not products.inputs:
        raise ConfigError("a linear of the loaded model computes no product that can be compared")
    found = products.inputs[0]
    differs = (found - wanted).abs() > TOLERANCE * wanted.abs()
    expected = linear(found, own.weight, own.bias)
    if own.left is not None:
        expected = expected + linear(linear(exact, own.right), own.left)
    rows.append(
        (
            differs.double().mean().item(),
            _ratio(found - exact, wanted - exact, 1.0),
            _ratio(made - expected, expected, 0.0),
            float(not _rounds(loaded)),
        )
    )


def _ratio(difference: Tensor, reference: Tensor, neither: float) -> float:
    """Norm of ``difference`` over that of ``reference``; ``neither`` if both are 0."""
    above, below = difference.double().norm().item(), reference.double().norm().item()
    return above / below if below else math.inf if above else neither


def _rounds(module: nn.Module) -> bool:
    """Check whether a linear of compressed-tensors has a scheme for its input, and applies it."""
    module = getattr(module, "base_layer", module)
    scheme = getattr(module, "quantization_scheme", None)
    return getattr(scheme, "input_activations", None) is not None and getattr(module, "quantization_enabled", True)


class _Products(TorchFunctionMode):
    """Recorder of what matrix products get as input."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is linear:
            self.inputs.append(args[0])
        return function(*args, **(kwargs or {}))
