"""How the error of a quantized model grows over its depth: the residual stream after each layer beside that of full precision.

With x the stream that enters a layer F in full precision, x' that of the quantized model and F' its layer, the error after the layer splits
exactly into what the layer adds, F'(x) - F(x), and what it passes on, F'(x') - F'(x). Each is given relative to F(x), token by token, as the mean
over tokens of the ratio of Euclidean norms: a few tokens of huge norm (attention sinks) weigh no more than others.

A rotation of the residual stream (R1) turns the basis of the quantized model; full precision is turned with it before they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import layer_inputs
from ..errors import NumericalFailure
from ..transforms.composition import Transform

PARTS = ("error", "added", "passed_on")


@torch.no_grad()
def error_growth(model: nn.Module, reference: nn.Module, windows: Tensor, basis: Tensor | None = None,
                 progress: Callable[[Iterable], Iterable] = iter) -> list[dict[str, float]]:
    """One dict of ``PARTS`` (relative errors, no unit) for each decoder layer of ``model``.

    ``model`` and ``reference`` are transformers decoders of one shape and dtype on one device, quantized and unmodified; ``windows``
    (count, window) token ids; ``basis`` as :func:`residual_basis` has it. Raises :class:`NumericalFailure` where a stream is not finite.
    """
    device = next(model.parameters()).device
    basis = None if basis is None else basis.to(device, torch.float64)
    exact, wanted = layer_inputs(reference, windows.to(device))
    own, arguments = layer_inputs(model, windows.to(device))
    found = []
    for index, layer, original in zip(progress(range(len(arguments))), model.model.layers, reference.model.layers, strict=True):
        sums = torch.zeros(len(PARTS), dtype=torch.float64)
        for window in range(len(exact)):
            rows = slice(window, window + 1)
            added = advanced(layer, turned(exact[rows], basis), arguments[index])
            exact[rows], own[rows] = advanced(original, exact[rows], wanted[index]), advanced(layer, own[rows], arguments[index])
            target = turned(exact[rows], basis)
            norms = target.double().norm(dim=-1)
            errors = (own[rows] - target, added - target, own[rows] - added)
            sums += torch.stack([(error.double().norm(dim=-1) / norms).mean() for error in errors]).cpu()
        if not torch.isfinite(sums).all():
            raise NumericalFailure(f"residual stream after layer {index} is NaN or infinite")
        found.append(dict(zip(PARTS, (sums / len(exact)).tolist())))
    return found


def advanced(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What leaves a decoder layer when ``hidden`` (1, tokens, d) enters it."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def turned(hidden: Tensor, basis: Tensor | None) -> Tensor:
    """``hidden`` (*batch, d) of full precision in the basis of the quantized model."""
    return hidden if basis is None else (hidden.to(basis) @ basis).to(hidden)


def residual_basis(transform: Transform, size: int) -> Tensor | None:
    """R (d, d), float64, with which ``transform`` turns a residual stream of ``size`` d channels into x R; None where it leaves it as it is."""
    unit = torch.eye(size, dtype=torch.float64)
    ends = {"embedding": unit.clone(), "final_norm": torch.ones(size, dtype=torch.float64)}
    transform.fold_ends(ends)
    return None if torch.equal(ends["embedding"], unit) else ends["embedding"]
