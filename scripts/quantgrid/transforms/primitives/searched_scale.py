"""Primitives: scalings searched per layer and site in one-parameter families.

The criterion is the error of rounded outputs (``search_objective.py``). The families are
SmoothQuant's (alpha), AWQ's (powers of the mean magnitude) and OS+'s (a threshold for the extremes
of channels). The first candidate is the initial one and wins ties, so that a cell without rounding
keeps it. The scaling itself is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...inference.transform import Primitive
from ...schemes.cell_schemes import CellSchemes
from .scale import activation_magnitude, divide_input, smoothing_factors, weight_magnitude, widened
from .search_objective import OutputError

Candidates = Iterator[tuple[float, Tensor]]


@dataclass
class SearchedScale(Primitive, ABC):
    """Search over ``points`` candidates at each of ``sites``.

    ``round_activations`` rounds inputs in the search too. ``schemes`` are those of the cell; they
    are used in the fit only and not stored. ``online``: divide at run time where no weights can take
    the division.
    """

    sites: list[str]
    points: int
    round_activations: bool
    schemes: InitVar[CellSchemes | None] = None
    online: bool = field(default=False, kw_only=True)
    reads_layer = True

    def __post_init__(self, schemes: CellSchemes | None) -> None:
        self.cell = schemes

    @abstractmethod
    def candidates(self, layer: DecoderLayer, site: str) -> Candidates:
        """Candidates (parameter value, s (n,) or (KV heads x head_dim,)), the initial one first."""

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Fit per site the scaling, ``{site}.chosen`` and ``{site}.errors``.

        ``chosen`` is [parameter of the family], ``errors`` [of the initial one, of the chosen one].
        """
        found: dict[str, Tensor] = {}
        for site in layer.plan.sites_of(self.sites):
            error = OutputError(
                layer.weights,
                layer.plan.sites[site].linears,
                layer.statistics[site],
                self.cell,
                site,
                self.round_activations,
            )
            tried = [(error(widened(s, site, layer.shape)), value, s) for value, s in self.candidates(layer, site)]
            least, value, found[site] = min(tried, key=lambda candidate: candidate[0])
            found[f"{site}.chosen"] = torch.tensor([value], dtype=torch.float64)
            found[f"{site}.errors"] = torch.tensor([tried[0][0], least], dtype=torch.float64)
        return found

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            divide_input(layer, site, parameters[site], self.online)


@dataclass
class SearchedSmoothing(SearchedScale):
    """SmoothQuant's family: alpha as given, then ``points`` values from 0 to 1."""

    alpha: float = 0.5
    statistic: str = "maximum"

    def candidates(self, layer: DecoderLayer, site: str) -> Candidates:
        activation, weight = activation_magnitude(layer, site, self.statistic), weight_magnitude(layer, site)
        for alpha in (self.alpha, *torch.linspace(0, 1, self.points, dtype=torch.float64).tolist()):
            yield alpha, smoothing_factors(activation, weight, alpha)


@dataclass
class SearchedPower(SearchedScale):
    """AWQ's family (arXiv 2306.00978): s = a^rho / sqrt(max a^rho min a^rho), a = E|x|.

    rho = 0, 1/points, ... < 1; rho = 0, no scaling, is the initial candidate. An unused channel
    keeps s = 1 and does not count in the extremes.
    """

    def candidates(self, layer: DecoderLayer, site: str) -> Candidates:
        mean = activation_magnitude(layer, site, "mean")
        used = mean > 0
        for step in range(self.points):
            power = mean.clamp(min=1e-30) ** (step / self.points)
            middle = (power[used].amax() * power[used].amin()).sqrt() if bool(used.any()) else 1.0
            yield step / self.points, torch.where(used, (power / middle).clamp(min=1e-4), torch.ones_like(power))


@dataclass
class SearchedThreshold(SearchedScale):
    """OS+'s family (arXiv 2304.09145): s_j = max(1, max_j / t, min_j / -t).

    t goes from the site's largest magnitude down to ``lowest``; the largest magnitude, no scaling,
    is the initial candidate. Thresholds have geometric steps. The published code has linear ones,
    of which very many are needed if one channel exceeds all others a thousandfold.
    """

    lowest: float = 0.1

    def candidates(self, layer: DecoderLayer, site: str) -> Candidates:
        largest = activation_magnitude(layer, site, "maximum")
        top = largest.amax().item()
        span = min(1.0, self.lowest / top) if top > 0 else 1.0
        for step in range(self.points):
            t = top * span ** (step / max(1, self.points - 1))
            yield t, (largest / t).clamp(min=1.0) if t > 0 else torch.ones_like(largest)
