"""Objective of searched scalings: output error of a site's linears under the schemes of the cell.

The weight term is exact on the calibration tokens, tr(E C Eᵀ) / tr(W C Wᵀ) with E the weight error
and C the second moment. The activation term, if the search rounds activations, uses the token
sample, |(Q(x) - x) Ŵᵀ|² / |x Wᵀ|²; the sample overrepresents the largest tokens. The objective is
their sum, without the cross term, twice the product of the two errors. The published searches
(AWQ, OS+) run the block behind the site (attention, MLP) and compare its outputs; here the outputs
of the linears that read the site are compared, and the model never runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...inference.activations import choose
from ...linalg.quadratic import output_square
from ...models.plans import kind_of
from ...quantizer.tensors import fake_quantize
from ...schemes.cell_schemes import CellSchemes


class OutputError:
    """Relative output error of ``linears``, (m, n) each in ``weights``, as a function of channel scales.

    The linears share ``site``. Their weights are read one at a time, because those of many experts in
    float64 do not fit in memory. ``round_activations``: whether the input is rounded as well. Tensors
    without a scheme in ``schemes`` are not rounded.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        linears: Sequence[str],
        statistics: SiteStatistics,
        schemes: CellSchemes,
        site: str,
        round_activations: bool,
    ):
        self.weights, self.linears, self.statistics = weights, linears, statistics
        self.scheme = schemes.weight and schemes.weight.separate
        self.candidates = schemes.activation.get(kind_of(site), ()) if round_activations else ()
        self.moment, self.samples = statistics.second_moment.float(), statistics.samples.float()
        self.energy = sum(_energy(weight, self.moment) for weight in self._rows())
        self.sample_energy = sum(_squares(self.samples @ weight.mT) for weight in self._rows())

    def _rows(self) -> Iterator[Tensor]:
        """Yield the weights in float32."""
        return (self.weights[linear].float() for linear in self.linears)

    def __call__(self, s: Tensor) -> float:
        """Error for x̃ = x / s; ``s`` (n,)."""
        scaled, change = s.float(), self._input_change(s)
        weight_part = activation_part = 0.0
        for weight in self._rows():
            used = weight * scaled
            if self.scheme is not None:
                used = fake_quantize(used, self.scheme)
                weight_part += _energy(used / scaled - weight, self.moment)
            if change is not None:
                activation_part += _squares(change @ used.mT)
        return _ratio(weight_part, self.energy) + _ratio(activation_part, self.sample_energy)

    def _input_change(self, s: Tensor) -> Tensor | None:
        """Rounding error Q(x / s) - x / s on the token sample."""
        if not self.candidates:
            return None
        found = self.statistics.transformed(1 / s)
        tokens = found.samples.float()
        return choose(self.candidates, found)[0](tokens) - tokens


def _energy(rows: Tensor, moment: Tensor) -> float:
    """tr(rows moment rowsᵀ)."""
    return output_square(rows, moment, torch.float64).item()


def _squares(x: Tensor) -> float:
    return torch.sum(x * x, dtype=torch.float64).item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
