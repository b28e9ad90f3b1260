"""Online operations of a transform on site inputs, and their cost per token.

An operation is a dict: ``operation`` is its name, the other entries are its options and tensors,
``{"operation": "subtract", "shift": z}``. Its function takes the input (*batch, n), n channels, and
these entries; the result has the shape and the dtype of the input. A transform that folds into the
weights entirely has no online operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..linalg.hadamard import apply_hadamard
from ..linalg.hadamard_orders import hadamard_factors
from ..linalg.kronecker import apply_kronecker

Operation = Mapping[str, Any]


def block_hadamard(x: Tensor, size: int) -> Tensor:
    """Multiply every run of ``size`` channels by a Hadamard matrix: x (I ⊗ H)."""
    return apply_hadamard(x.unflatten(-1, (-1, size))).flatten(-2)


def head_hadamard(x: Tensor, heads: int) -> Tensor:
    """Mix the same channel of all ``heads`` heads by a Hadamard matrix: x (H ⊗ I)."""
    return apply_hadamard(x.unflatten(-1, (heads, -1)).mT).mT.flatten(-2)


def head_rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Mix the same channel of all heads by ``matrix`` (heads, heads): x (M ⊗ I)."""
    return (matrix.mT @ x.unflatten(-1, (matrix.shape[0], -1))).flatten(-2)


def signed_hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """Multiply by a randomized Hadamard matrix: x diag(s) H, ``signs`` s (n,)."""
    return apply_hadamard(x * signs)


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply every channel by its entry of ``factor`` (n,)."""
    return x * factor


def subtract(x: Tensor, shift: Tensor) -> Tensor:
    """x - z, ``shift`` (n,)."""
    return x - shift


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Permute channels: ``order[j]`` of x moves to place j; ``order`` (n,) is a permutation."""
    return x.index_select(-1, order)


def block_rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply runs of k channels by their matrix in ``blocks`` (n / k, k, k), or all by one
    (1, k, k)."""
    runs = x.unflatten(-1, (-1, blocks.shape[-1]))
    return (runs @ blocks[0] if len(blocks) == 1 else torch.einsum("...bi,bij->...bj", runs, blocks)).flatten(-2)


ONLINE: dict[str, Callable[..., Tensor]] = {
    "hadamard": apply_hadamard,
    "signed_hadamard": signed_hadamard,
    "multiply": multiply,
    "block_hadamard": block_hadamard,
    "head_hadamard": head_hadamard,
    "head_rotate": head_rotate,
    "subtract": subtract,
    "gather": gather,
    "block_rotate": block_rotate,
    "kronecker": apply_kronecker,
}


def apply(operation: Operation, x: Tensor) -> Tensor:
    """Apply one operation to ``x``."""
    return ONLINE[operation["operation"]](
        x, **{name: value for name, value in operation.items() if name != "operation"}
    )


def cast(operation: Operation, dtype: torch.dtype, device: torch.device | str | None = None) -> Operation:
    """Operation with its tensors in ``dtype``, moved to ``device`` if given; channel orders stay integers."""
    return {
        **operation,
        **{
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors_of(operation).items()
        },
    }


def as_rows(operation: Operation) -> Callable[[Tensor], Tensor]:
    """Operation as a map of rows in any dtype, for weights and statistics."""
    return lambda x: apply(cast(operation, x.dtype, x.device), x)


def tensors_of(operation: Operation) -> dict[str, Tensor]:
    """Tensors of the operation that a checkpoint stores, by name."""
    return {name: value for name, value in operation.items() if isinstance(value, Tensor)}


def stored(site: str, operations: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Operations of ``site`` as stored: JSON without tensors, and tensors by name.

    Tensors are float32, channel orders int32, named ``{site}.online.{number}.{name}``.
    """
    listed = [
        {name: value for name, value in operation.items() if not isinstance(value, Tensor)} for operation in operations
    ]
    return listed, {
        f"{site}.online.{number}.{name}": tensor.float() if tensor.is_floating_point() else tensor.int()
        for number, operation in enumerate(operations)
        for name, tensor in tensors_of(operation).items()
    }


def restored(
    site: str, listed: list[dict[str, Any]], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """Inverse of :func:`stored`, with tensors in ``dtype``; channel orders stay integers."""
    found = []
    for number, operation in enumerate(listed):
        prefix = f"{site}.online.{number}."
        parts = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        found.append(cast({**operation, **parts}, dtype))
    return found


def _fast_hadamard(order: int) -> int:
    core, power = hadamard_factors(order)
    return power + (core if core > 1 else 0)


# Additions and multiplications per channel of a token; a Hadamard matrix counts as a fast
# transform, its core as dense.
_PER_CHANNEL: dict[str, Callable[[int, Operation], int]] = {
    "hadamard": lambda n, operation: _fast_hadamard(n),
    "block_hadamard": lambda n, operation: _fast_hadamard(operation["size"]),
    "head_hadamard": lambda n, operation: _fast_hadamard(operation["heads"]),
    "head_rotate": lambda n, operation: 2 * operation["matrix"].shape[-1],
    "signed_hadamard": lambda n, operation: 1 + _fast_hadamard(n),
    "multiply": lambda n, operation: 1,
    "subtract": lambda n, operation: 1,
    "gather": lambda n, operation: 0,
    "block_rotate": lambda n, operation: 2 * operation["blocks"].shape[-1],
    "kronecker": lambda n, operation: 2 * sum(factor.shape[-1] for factor in tensors_of(operation).values()),
}


def arithmetic(operation: Operation, n: int) -> int:
    """Additions and multiplications of one operation per token of ``n`` channels.

    Data movement counts as zero.
    """
    return n * _PER_CHANNEL[operation["operation"]](n, operation)
