"""What a searched scaling minimizes: the error of a site's outputs once its linears are rounded in the schemes of the cell.

The weight's part is exact for the calibration tokens, tr(E C Eᵀ) / tr(W C Wᵀ) with E the weight's error and C the second moment. The part
of the activations, where they are rounded in the search, is that of the token sample, |(Q(x) - x) Ŵᵀ|² / |x Wᵀ|²; the sample holds more of
the largest tokens than the text does. The sum is the objective: one term is left out, twice the product of the two errors. The published
searches (AWQ, OS+) run the block behind the site (attention, MLP) and compare its outputs; here the outputs of the linears that read the
site are compared, and the model is never run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import choose
from ..cell_schemes import CellSchemes
from ..quantizer import fake_quantize
from ..statistics import SiteStatistics


class OutputError:
    """Relative output error of the linears ``weights`` [(m, n), ...] that share a site, as a function of the scaling of its channels.

    ``round_activations``: whether the site's input is rounded as well. Nothing is rounded where ``schemes`` says nothing of it.
    """

    def __init__(self, weights: Sequence[Tensor], statistics: SiteStatistics, schemes: CellSchemes, site: str, round_activations: bool):
        self.weights, self.statistics, self.scheme = [weight.float() for weight in weights], statistics, schemes.weight
        self.candidates = schemes.activation.get(site, ()) if round_activations else ()
        self.moment, self.samples = statistics.second_moment.float(), statistics.samples.float()
        self.energy = sum(_energy(weight, self.moment) for weight in self.weights)
        self.sample_energy = sum(_squares(self.samples @ weight.mT) for weight in self.weights)

    def __call__(self, s: Tensor) -> float:
        """The error for x̃ = x / s; ``s`` (n,)."""
        scaled, change = s.float(), self._input_change(s)
        weight_part = activation_part = 0.0
        for weight in self.weights:
            used = weight * scaled
            if self.scheme is not None:
                used = fake_quantize(used, self.scheme)
                weight_part += _energy(used / scaled - weight, self.moment)
            if change is not None:
                activation_part += _squares(change @ used.mT)
        return _ratio(weight_part, self.energy) + _ratio(activation_part, self.sample_energy)

    def _input_change(self, s: Tensor) -> Tensor | None:
        """Q(x / s) - x / s on the token sample."""
        if not self.candidates:
            return None
        found = self.statistics.transformed(1 / s)
        tokens = found.samples.float()
        return choose(self.candidates, found)[0](tokens) - tokens


def _energy(rows: Tensor, moment: Tensor) -> float:
    """tr(rows moment rowsᵀ)."""
    return torch.sum((rows @ moment) * rows, dtype=torch.float64).item()


def _squares(x: Tensor) -> float:
    return torch.sum(x * x, dtype=torch.float64).item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
