"""Emphasis of a layer's output error: weights of channels, and errors that do not count.

Channel c of a layer's output weighs E[g_c²], the diagonal of the Fisher information in the
full-precision model (``calibration/sensitivity.py``). FIMA-Q (arXiv 2506.11543) takes the same diagonal
from the first power of the gradient of the divergence, several times during a training, and adds a
low-rank part; a gradient of the divergence is the Fisher information times an error, so its first power
is the square of g. Trimming leaves out the smallest or the largest errors: SignRound v2 (arXiv 2512.04746)
drops the largest 0.1 % of a batch, APQ-ViT (arXiv 2303.14341) small ones; we had no access to
the published ratio of the latter. Deviation: shares are those of a piece of a batch, at most
``memory.PIECE`` tokens or one window, since no two pieces are in memory at a time.

Behind LayerNorms g has no mean over the channels, since they subtract that of their input. An offline rotation
removes the mean of the stream instead, so that the mean of an error counts, which these weights do not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizer.ranges import whole


@dataclass(frozen=True)
class Emphasis:
    """Weights ``channels`` (d,) of squared errors behind the map ``back`` (d, d), none for the identity, and
    shares of the smallest and the largest errors that are left out, ``trim_low`` and ``trim_high`` in
    [0, 1), of every piece of a batch."""

    channels: Tensor | None = None
    trim_low: float = 0.0
    trim_high: float = 0.0
    back: Tensor | None = None

    def weighted(self, outputs: Tensor) -> Tensor:
        """``outputs`` (*batch, d), mapped back, times the square roots of the weights."""
        if self.channels is None:
            return outputs
        return (outputs if self.back is None else outputs @ self.back) * self.channels.sqrt()

    def counted(self, found: Tensor, wanted: Tensor) -> Tensor:
        """``found`` (*batch, d), weighted, equal to the already weighted ``wanted`` where the error is left
        out; an error that is not finite never is."""
        found = self.weighted(found)
        if not (self.trim_low or self.trim_high):
            return found
        with torch.no_grad():
            error = (found - wanted).abs()
            flat, left_out = error.flatten(), torch.zeros(error.numel(), dtype=torch.bool, device=error.device)
            for share, largest in ((self.trim_low, False), (self.trim_high, True)):
                left_out[flat.topk(whole(share, len(flat)), largest=largest).indices] = True
            left_out &= flat.isfinite()
        return torch.where(left_out.view_as(error), wanted, found)
