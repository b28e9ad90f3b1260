"""Residual error: relative error of the residual stream after each layer of a quantized model.

With x the stream that enters layer F in full precision, x' that of the quantized model and F' its
layer, the error after the layer is exactly the sum of the error added by the layer, F'(x) - F(x),
and the propagated error, F'(x') - F'(x). Each is relative to F(x), per token, averaged over tokens
as a ratio of Euclidean norms: a few tokens of huge norm (attention sinks) weigh no more than
others. Norms do not add, squares do: with a added and p propagated, |a + p|² = |a|² + |p|² +
2⟨a, p⟩, and the last term is the interaction. The split into local, accumulated and interaction
parts is that of arXiv 2509.23500, here by vectors and with the quantized layer in both parts.

A rotation of the residual stream (R1) changes the basis of the quantized model; the full-precision
stream is rotated likewise before the comparison. Before LayerNorms the rotation also removes the mean
of the stream over its channels (``transforms/primitives/stream.py``), and so does the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.collect import layer_inputs
from ..ground.errors import NumericalFailure
from ..inference.transform import Transform
from ..models.shapes import ModelShape

PARTS = ("error", "added", "passed_on")  # relative norms
SQUARES = tuple(f"{part}_squared" for part in PARTS)  # and squared ones
INTERACTION = "interaction"  # the rest of the squared error
MEASURES = (*PARTS, *SQUARES, INTERACTION)


@torch.no_grad()
def error_growth(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor,
    basis: Tensor | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict[str, float]]:
    """Relative errors, one dict of ``MEASURES`` (no unit) for each decoder layer of ``model``.

    ``model`` and ``reference`` are transformers decoders of one shape and dtype on one device,
    quantized and unmodified; ``windows`` (count, window) token ids; ``basis`` is the result of
    :func:`residual_basis`. Raises :class:`NumericalFailure` if a stream is not finite.
    """
    device = next(model.parameters()).device
    basis = None if basis is None else basis.to(device, torch.float64)
    exact, wanted = layer_inputs(reference, windows.to(device))
    own, arguments = layer_inputs(model, windows.to(device))
    found = []
    for index, layer, original in zip(
        progress(range(len(arguments))), model.model.layers, reference.model.layers, strict=True
    ):
        sums = torch.zeros(len(MEASURES), dtype=torch.float64)
        for window in range(len(exact)):
            rows = slice(window, window + 1)
            added = advanced(layer, turned(exact[rows], basis), arguments[index])
            exact[rows], own[rows] = (
                advanced(original, exact[rows], wanted[index]),
                advanced(layer, own[rows], arguments[index]),
            )
            target = turned(exact[rows], basis)
            parts = token_errors(own[rows], added, target)
            sums += torch.stack([parts[name].mean() for name in MEASURES]).cpu()
        if not torch.isfinite(sums).all():
            raise NumericalFailure(f"residual error: the stream after layer {index} is NaN or infinite")
        found.append(dict(zip(MEASURES, (sums / len(exact)).tolist())))
    return found


def token_errors(own: Tensor, added: Tensor, target: Tensor) -> dict[str, Tensor]:
    """``MEASURES`` of every token, (*batch,) float64 each, relative to the norm of ``target`` or to its
    square.

    Outputs (*batch, d) of a layer: ``own`` of the quantized layer in the quantized model, ``added`` of
    the quantized layer for the full-precision input, ``target`` in full precision.
    """
    own, added, target = own.double(), added.double(), target.double()
    local, passed, whole = added - target, own - added, target.square().sum(-1)
    squares = {
        name: error.square().sum(-1) / whole for name, error in zip(SQUARES, (own - target, local, passed), strict=True)
    }
    norms = {name: squares[square].sqrt() for name, square in zip(PARTS, SQUARES)}
    return {**norms, **squares, INTERACTION: 2 * (local * passed).sum(-1) / whole}


def advanced(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Output of a decoder layer for ``hidden`` (1, tokens, d)."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def turned(hidden: Tensor, basis: Tensor | None) -> Tensor:
    """Full-precision ``hidden`` (*batch, d) in the basis of the quantized model."""
    return hidden if basis is None else (hidden.to(basis) @ basis).to(hidden)


def residual_basis(transform: Transform, shape: ModelShape) -> Tensor | None:
    """Map B (d, d) of the residual stream of a model of ``shape`` by ``transform``, float64; None for the identity.

    The transformed stream is x B, with B a rotation R; before LayerNorms B = (I - 11ᵀ/d) R.
    """
    unit = torch.eye(shape.hidden_size, dtype=torch.float64)
    ends = {"embedding": unit.clone(), "final_norm": torch.ones_like(unit[0])}
    if shape.family.centered:
        ends["final_norm_center"] = torch.ones(1, dtype=torch.float64)
    transform.fold_ends(ends)
    return None if torch.equal(ends["embedding"], unit) else ends["embedding"]
