"""Calibration statistics of a site, and their closed-form transformation.

For X̃ = (X - 1 zᵀ) T the second moment is C̃ = Tᵀ (C - μzᵀ - zμᵀ + zzᵀ) T and the mean μ̃ = Tᵀ (μ -
z) (arXiv 2507.17417 compares methods under one calibration; the identity is elementary). Extremes
and mean absolute values transform exactly only under scaling and shifting; after mixing of channels
they are computed from the token sample and marked ``estimated``. All tensors may have leading
dimensions, so that one call covers several layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..ground.errors import NumericalFailure

Rows = Callable[[Tensor], Tensor]
LARGEST = 16  # tokens of largest norm at the end of the sample of a site


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of the inputs x of one site, n channels wide.

    ``count`` tokens seen; ``mean`` (n,); ``second_moment`` (n, n) = E[xxᵀ]; ``mean_absolute``,
    ``minimum``, ``maximum`` (n,); ``samples`` (tokens, n): drawn tokens and first tokens of windows in
    the order of the text, then the ``LARGEST`` of largest norm. ``solver_dtype``: float64, or float32 where
    factorizations of the second moment are computed in it first (``mitigations/solvers/precision.py``).
    ``scaling`` (n,): product of the diagonals applied since the channels were last mixed; None without any.
    """

    count: int
    mean: Tensor
    second_moment: Tensor
    mean_absolute: Tensor
    minimum: Tensor
    maximum: Tensor
    samples: Tensor
    estimated: bool = False
    solver_dtype: torch.dtype = torch.float64
    scaling: Tensor | None = None
    memory: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """Memoize ``make`` per instance: linears of one site share its factorizations."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def to(self, device: torch.device | str) -> Self:
        """Statistics with all tensors on ``device``."""
        tensors = {part.name: getattr(self, part.name) for part in fields(self)}
        moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, memory={}, **moved)

    def transformed(self, T: Tensor | Rows, z: Tensor | None = None) -> SiteStatistics:
        """Statistics of x̃ = Tᵀ(x - z).

        ``T`` is a vector (a diagonal), a matrix (n, m), or a function x -> x T on the last
        dimension. Vectors and matrices may have the leading dimensions too; a tensor in the shape
        of ``mean`` is a diagonal.
        """
        if z is not None:
            return self.shifted(z).transformed(T)
        if isinstance(T, Tensor) and (T.dim() == 1 or T.shape == self.mean.shape):
            return self._scaled(T)
        rows: Rows = (lambda x: x @ T.to(x.dtype)) if isinstance(T, Tensor) else T
        moment = rows(rows(self.second_moment).mT).mT
        return self._sampled(rows(self.mean.unsqueeze(-2)).squeeze(-2), moment, rows(self.samples))

    def permuted(self, order: Tensor) -> SiteStatistics:
        """Statistics of the channels permuted by ``order`` (n,); exactness is preserved."""
        moved = {
            name: getattr(self, name)[..., order]
            for name in ("mean", "mean_absolute", "minimum", "maximum", "samples", "factors")
        }
        moved["scaling"] = moved.pop("factors")
        return replace(self, memory={}, second_moment=self.second_moment[..., order, :][..., order], **moved)

    def shifted(self, z: Tensor) -> SiteStatistics:
        """Statistics of x - z: extremes stay exact, the mean absolute value comes from the
        sample."""
        z = z.to(self.mean)
        cross = self.mean.unsqueeze(-1) * z.unsqueeze(-2)
        moment = self.second_moment - cross - cross.mT + z.unsqueeze(-1) * z.unsqueeze(-2)
        samples = self.samples - z.unsqueeze(-2).to(self.samples)
        return replace(
            self,
            memory={},
            mean=self.mean - z,
            second_moment=moment,
            samples=samples,
            minimum=self.minimum - z,
            maximum=self.maximum - z,
            mean_absolute=samples.abs().mean(-2).to(self.mean),
            estimated=True,
        )

    def _scaled(self, t: Tensor) -> SiteStatistics:
        t = t.to(self.mean)
        low, high, both = self.minimum * t, self.maximum * t, t.to(self.second_moment)
        return replace(
            self,
            memory={},
            mean=self.mean * t,
            second_moment=self.second_moment * both.unsqueeze(-1) * both.unsqueeze(-2),
            mean_absolute=self.mean_absolute * t.abs(),
            minimum=torch.minimum(low, high),
            maximum=torch.maximum(low, high),
            samples=self.samples * t.unsqueeze(-2).to(self.samples),
            scaling=self.factors * t,
        )

    def _sampled(self, mean: Tensor, moment: Tensor, samples: Tensor) -> SiteStatistics:
        """Statistics with new exact moments; extremes and mean absolute values from the token
        sample."""
        return SiteStatistics(
            self.count,
            mean,
            moment,
            samples.abs().mean(-2).to(mean),
            samples.amin(-2).to(mean),
            samples.amax(-2).to(mean),
            samples,
            estimated=True,
            solver_dtype=self.solver_dtype,
        )

    def magnitude(self, kind: str) -> Tensor:
        """Magnitude of every channel (n,): ``maximum``, ``mean`` magnitude or root mean square
        ``rms``."""
        if kind == "rms":
            return self.second_moment.diagonal(dim1=-2, dim2=-1).double().clamp(min=0).sqrt()
        return self.mean_absolute if kind == "mean" else self.maximum_absolute

    @property
    def maximum_absolute(self) -> Tensor:
        """Largest magnitude per channel (n,)."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def factors(self) -> Tensor:
        """``scaling`` (n,), of ones without any."""
        return torch.ones_like(self.mean) if self.scaling is None else self.scaling

    @property
    def unscaled_maximum(self) -> Tensor:
        """Largest magnitude per channel (n,) without ``scaling``; 0 for a channel that it sets to 0."""
        size = self.factors.abs()
        return torch.where(size > 0, self.maximum_absolute / size, 0.0)

    @property
    def drawn(self) -> Tensor:
        """Sample (tokens, n) without the tokens of largest norm, which are kept for ranges and outliers."""
        return self.samples[..., : self.samples.shape[-2] - min(LARGEST, self.count), :]

    def require_finite(self, where: str) -> None:
        """Raise :class:`NumericalFailure` if the statistics hold NaN or infinity."""
        squares = self.second_moment.diagonal(
            dim1=-2, dim2=-1
        )  # a non-finite product has a factor with a non-finite square
        for name, values in (
            ("mean", self.mean),
            ("second_moment", squares),
            ("minimum", self.minimum),
            ("maximum", self.maximum),
        ):
            if not torch.isfinite(values).all():
                raise NumericalFailure(f"{where}: the calibration statistics hold NaN or infinity ({name})")


@dataclass(frozen=True)
class PairedStatistics(SiteStatistics):
    """Statistics of inputs x with their relation to the inputs x* of the full-precision model.

    ``cross`` (n, n) = E[(x* - x) xᵀ]. Both inputs belong to the same token, so ``cross`` exists
    only if both models ran together; it cannot be transformed.
    """

    cross: Tensor | None = None


_TENSORS = ("mean", "second_moment", "mean_absolute", "minimum", "maximum", "samples")


def stack(statistics: Sequence[SiteStatistics]) -> SiteStatistics:
    """Stack the statistics of several layers along a leading layer dimension."""
    tensors = {name: torch.stack([getattr(s, name) for s in statistics]) for name in _TENSORS}
    about = {
        "count": statistics[0].count,
        "estimated": any(s.estimated for s in statistics),
        "solver_dtype": statistics[0].solver_dtype,
        "scaling": torch.stack([s.factors for s in statistics]),
    }
    if all(isinstance(s, PairedStatistics) for s in statistics):
        return PairedStatistics(**about, **tensors, cross=torch.stack([s.cross for s in statistics]))
    return SiteStatistics(**about, **tensors)


def to_tensors(name: str, statistics: SiteStatistics) -> dict[str, Tensor]:
    """Named tensors of one site for a safetensors file; float32 moments keep the accuracy of the
    inputs."""
    flat = {f"{name}.{field}": getattr(statistics, field).to(torch.float32) for field in _TENSORS}
    return {**flat, f"{name}.count": torch.tensor(statistics.count)}


def from_file(file, name: str) -> SiteStatistics:
    """Read one site from an open safetensors file, in its float32; vectors as float64."""
    tensors = {field: file.get_tensor(f"{name}.{field}") for field in _TENSORS}
    vectors = {field: tensor.double() for field, tensor in tensors.items() if tensor.dim() == 1}
    return SiteStatistics(count=count_in_file(file, name), **tensors | vectors)


def count_in_file(file, name: str) -> int:
    """Read the number of tokens that one site saw from an open safetensors file."""
    return int(file.get_tensor(f"{name}.count"))
