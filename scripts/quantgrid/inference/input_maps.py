"""Linear maps of a site's input with their inverses, for trainings with unchanged weights.

The primitives of a transform extend the map of each site in order, starting from ``EMPTY``. The
maps are applied in ``learning/mapped.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Rows


@dataclass(frozen=True)
class BlockMap:
    """x T, T block-diagonal: every run of k channels is multiplied by the matrix of its block.

    Each block has the same number of adjacent runs. ``forward`` T and ``inverse`` T⁻¹ are
    (blocks, k, k), or None for the identity.
    """

    forward: Tensor | None = None
    inverse: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.forward is None

    def divided(self, s: Tensor) -> BlockMap:
        """Append a division by ``s`` (blocks, k)."""
        if self.forward is None or self.inverse is None:
            return BlockMap(torch.diag_embed(1 / s), torch.diag_embed(s))
        return BlockMap(self.forward / s.unsqueeze(-2), self.inverse * s.unsqueeze(-1))

    def rotated(self, matrices: Tensor) -> BlockMap:
        """Append a product with orthogonal ``matrices`` (blocks, k, k)."""
        if self.forward is None or self.inverse is None:
            return BlockMap(matrices, matrices.mT)
        return BlockMap(self.forward @ matrices, matrices.mT @ self.inverse)


@dataclass(frozen=True)
class StepMap:
    """Sequence of maps with their inverses, for a site too wide for a matrix."""

    steps: tuple[tuple[Rows, Rows], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.steps

    def divided(self, s: Tensor) -> StepMap:
        """Append a division by ``s`` (1, n)."""
        return self.then(lambda x: x / s[0], lambda x: x * s[0])

    def then(self, forward: Rows, inverse: Rows) -> StepMap:
        """Append a map and its inverse."""
        return StepMap((*self.steps, (forward, inverse)))


InputMap = BlockMap | StepMap
EMPTY: dict[str, InputMap] = {
    "attention_input": BlockMap(),
    "output_input": BlockMap(),
    "mlp_input": BlockMap(),
    "down_input": StepMap(),
}
