"""Column-wise rounding with error compensation: the recursion of GPTQ and GPTAQ.

With U upper triangular, UᵀU = H⁻¹, column i leaves the error e_i = (w_i - q_i) / U_ii, and every
later column j becomes w_j - e_i U_ij (arXiv 2210.17323), plus w_i P_ij under GPTAQ (arXiv
2504.02692). The columns are halved recursively and errors pass between halves by matrix products;
columns are rounded in the published order. Tensors are transposed, (*batch, n, m): a column is a
row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...quantizer.rounding import round_values
from ...quantizer.scales import QuantizationParameters
from ...quantizer.tensors import codebooks, find_parameters, step_size, zero_points
from ...schemes.quant_scheme import QuantScheme

LEAF = 16  # columns rounded one by one before matrix products take over
_STORED = ("scale", "zero_point", "codebook")


@dataclass(frozen=True)
class Columns:
    """Scheme parameters of all columns: steps and zero points (*batch, n, m), codebooks (entries,
    *batch, n, m).

    Fields are None where the scheme has none. ``running``: scales of a group are recomputed from
    its updated columns when its first column is reached.
    """

    scheme: QuantScheme
    parameters: QuantizationParameters
    steps: Tensor
    zeros: Tensor | None
    books: Tensor | None
    running: bool = False

    @classmethod
    def of(
        cls, weight: Tensor, scheme: QuantScheme, running: bool = False, global_scale: Tensor | None = None
    ) -> Columns:
        """Parameters of ``weight`` (*batch, m, n); ``running`` has no effect without groups.

        ``global_scale`` (*batch, 1, 1) replaces the one computed from the weight.
        """
        parameters = find_parameters(weight, scheme, global_scale)
        parts, running = _per_columns(parameters, scheme, weight.shape), running and scheme.granularity == "group"
        return cls(
            scheme, parameters, *(part.clone() if running and part is not None else part for part in parts), running
        )

    def changed(self, change: Callable[[Tensor], Tensor]) -> Columns:
        """Apply a reordering ``change`` along the last dimension but one."""
        return replace(
            self,
            **{
                name: change(part)
                for name, part in (("steps", self.steps), ("zeros", self.zeros), ("books", self.books))
                if part is not None
            },
        )

    def rounded(self, column: Tensor, i: int) -> Tensor:
        """Round column ``i`` with values ``column`` (*batch, m)."""
        step, zero = self.steps[..., i, :], None if self.zeros is None else self.zeros[..., i, :]
        if self.books is None:
            return round_values(column, step, zero, self.scheme)
        return round_values(
            column.unsqueeze(-1), step.unsqueeze(-1), None, self.scheme, self.books[..., i, :].movedim(0, -1)
        ).squeeze(-1)

    def refresh(self, columns: Tensor, start: int) -> None:
        """Recompute the parameters of the group at ``start`` from its ``columns`` (*batch, group,
        m), in place.

        A global scale stays.
        """
        values = columns.mT.contiguous()
        found = find_parameters(values, self.scheme, self.parameters.global_scale)
        group = start // self.scheme.group_size
        for name in _STORED:
            if (part := getattr(found, name)) is not None:
                getattr(self.parameters, name).select(values.dim() - 1, group).copy_(part.select(values.dim() - 1, 0))
        for own, new in zip((self.steps, self.zeros, self.books), _per_columns(found, self.scheme, values.shape)):
            if own is not None:
                own[..., start : start + columns.shape[-2], :] = new


def _per_columns(
    parameters: QuantizationParameters, scheme: QuantScheme, shape: torch.Size
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Steps, zero points (*batch, n, m) and codebooks (entries, *batch, n, m) of a weight (*batch,
    m, n)."""
    steps, zeros, books = (part(parameters, scheme, shape) for part in (step_size, zero_points, codebooks))
    zeros = None if zeros is None else _per_column(zeros, shape[-1])
    books = None if books is None else torch.stack([_per_column(entry, shape[-1]) for entry in books.unbind(-1)])
    return _per_column(steps, shape[-1]), zeros, books


def _per_column(values: Tensor, columns: int) -> Tensor:
    """Expand values per (row, group) (*batch, m, groups) to (*batch, n, m), without copies in a
    group."""
    transposed = values.mT
    groups = transposed.shape[-2]
    return (
        transposed.unsqueeze(-2).expand(*transposed.shape[:-1], columns // groups, transposed.shape[-1]).flatten(-3, -2)
    )


class Sweep:
    """Round ``columns`` (*batch, n, m) in place; ``factor`` U, ``cross_term`` P of GPTAQ: (*batch,
    n, n)."""

    def __init__(self, columns: Tensor, factor: Tensor, used: Columns, cross_term: Tensor | None = None):
        self.columns, self.factor, self.used, self.cross_term = columns, factor, used, cross_term
        self.errors = torch.empty_like(columns)
        # each column just before rounding
        self.reached = None if cross_term is None else torch.empty_like(columns)

    def run(self, block_size: int) -> None:
        """Round all columns; apply errors to later blocks after each block of ``block_size``
        columns.

        With running scales a block is a multiple of whole groups.
        """
        count, group = self.columns.shape[-2], self.used.scheme.group_size
        size = -(-block_size // group) * group if self.used.running else block_size
        for start in range(0, count, size):
            end = min(start + size, count)
            self._round(start, end)
            self._offset(start, end, count)

    def _round(self, start: int, end: int) -> None:
        unit = LEAF
        if self.used.running and start % self.used.scheme.group_size == 0:
            group = self.used.scheme.group_size
            if end - start > group:
                unit = group
            elif end - start == group:
                self.used.refresh(self.columns[..., start:end, :], start)
        if end - start <= LEAF and unit == LEAF:
            self._one_by_one(start, end)
            return
        middle = start + ((end - start) // 2 + unit - 1) // unit * unit
        self._round(start, middle)
        self._offset(start, middle, end)
        self._round(middle, end)

    def _one_by_one(self, start: int, end: int) -> None:
        for i in range(start, end):
            column = self.columns[..., i, :]
            rounded = self.used.rounded(column, i)
            error = (column - rounded) / self.factor[..., i, i, None]
            self.errors[..., i, :] = error
            if self.cross_term is not None:
                self.reached[..., i, :] = column
                self.columns[..., i + 1 : end, :] += self.cross_term[..., i, i + 1 : end, None] * column.unsqueeze(-2)
            self.columns[..., i, :] = rounded
            if i + 1 < end:
                self.columns[..., i + 1 : end, :] -= self.factor[..., i, i + 1 : end, None] * error.unsqueeze(-2)

    def _offset(self, start: int, middle: int, end: int) -> None:
        """Apply the errors of columns ``start`` to ``middle`` to columns ``middle`` to ``end``."""
        if middle == end:
            return
        self.columns[..., middle:end, :] -= (
            self.factor[..., start:middle, middle:end].mT @ self.errors[..., start:middle, :]
        )
        if self.cross_term is not None:
            self.columns[..., middle:end, :] += (
                self.cross_term[..., start:middle, middle:end].mT @ self.reached[..., start:middle, :]
            )
