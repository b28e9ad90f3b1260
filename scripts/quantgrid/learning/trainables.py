"""Unconstrained parametrization of the learned parameters of a transform.

rotation    a point of the orthogonal group, updated by geoopt's Riemannian Adam (Becigneul and
            Ganea, arXiv 1810.00760), as OSTQuant and the authors of arXiv 2507.17417 do. The
            step is divided by one number for the whole matrix: at learning rate r the first
            step moves any matrix, of any width, by at most 2 sqrt(2) r in the Frobenius norm.
cayley      start x Q with Q = cayley(A), A skew-symmetric and initially 0
            (``torch.nn.utils.parametrizations``, trivialization of arXiv 1909.09501); Adam
            updates each entry of A, as in FlatQuant's code: the angle of a step grows with
            the width
positive    exp(theta)
fraction    sigmoid(gamma), within (0, 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..inference.transform import Parameters, Transform


class _Orthogonal(nn.Module):
    """Square orthogonal matrices (*batch, n, n)."""

    matrix: Tensor

    def forward(self) -> Tensor:
        return self.matrix

    def exported(self) -> Tensor:
        """Nearest orthogonal matrix in float64: float32 steps drift by about 1e-6."""
        u, _, v = torch.linalg.svd(self.matrix.detach().double().cpu())
        return u @ v


class Rotation(_Orthogonal):
    def __init__(self, start: Tensor):
        super().__init__()
        self.matrix = geoopt.ManifoldParameter(start.clone(), manifold=geoopt.Stiefel())

    def forward(self) -> Tensor:
        return self.matrix.as_subclass(Tensor)


class Cayley(_Orthogonal):
    def __init__(self, start: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(start)
        parametrizations.orthogonal(self, "matrix", "cayley")


class Positive(nn.Module):
    def __init__(self, start: Tensor):
        super().__init__()
        self.logarithm = nn.Parameter(start.log())

    def forward(self) -> Tensor:
        return self.logarithm.exp()

    def exported(self) -> Tensor:
        return self.logarithm.detach().double().cpu().exp()


class Fraction(nn.Module):
    def __init__(self, start: Tensor):
        super().__init__()
        self.logit = nn.Parameter(torch.logit(start))

    def forward(self) -> Tensor:
        return self.logit.sigmoid()

    def exported(self) -> Tensor:
        return self.logit.detach().double().cpu().sigmoid()


KINDS: dict[str, type[nn.Module]] = {"rotation": Rotation, "cayley": Cayley, "positive": Positive, "fraction": Fraction}


def learned_kinds(transform: Transform, layers: Iterable[int] | None = None) -> dict[str, str]:
    """Kind of every learned parameter by name, of all layers and shared, or of ``layers`` only."""
    found, scopes = {}, None if layers is None else {str(layer) for layer in layers}
    for name in transform.parameters:
        number, scope, *parts = name.split(".")
        learns = getattr(transform.primitives[int(number)], "learns", {})
        kind = next((learns[part] for part in parts if part in learns), None)
        if kind and (scopes is None or scope in scopes):
            found[name] = kind
    return found


Bounds = tuple[float, float]  # smallest and largest value of a parameter


class Free(nn.Module):
    """Named parameters as they are, initialized to ``start``, those of ``bounds`` kept between (smallest,
    largest)."""

    def __init__(self, start: Parameters, bounds: Mapping[str, Bounds] | None = None):
        super().__init__()
        self.names, self.bounds = list(start), bounds or {}
        self.tensors = nn.ParameterList(tensor.clone() for tensor in start.values())

    def values(self) -> Parameters:
        """Parameters by name."""
        return dict(zip(self.names, self.tensors))

    @torch.no_grad()
    def confine(self) -> None:
        """Move every parameter to its bounds."""
        values = self.values()
        for name, (smallest, largest) in self.bounds.items():
            values[name].clamp_(smallest, largest)


class SignDescent(torch.optim.Optimizer):
    """Steps of the learning rate against the sign of every derivative (SignSGD, arXiv 1802.04434), without
    momentum."""

    def __init__(self, groups: Iterable[dict[str, Any]]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class Trainables(nn.Module):
    """Named parameters in unconstrained form (float32), initialized to ``start``."""

    def __init__(self, start: Parameters, kinds: Mapping[str, str], device: torch.device | str = "cpu"):
        super().__init__()
        self.kinds = dict(kinds)
        self.forms = nn.ModuleList(KINDS[kind](start[name].to(device, torch.float32)) for name, kind in kinds.items())

    def values(self) -> Parameters:
        """Parameters by name, differentiable with respect to their unconstrained form."""
        return {name: form() for name, form in zip(self.kinds, self.forms)}

    def exported(self) -> Parameters:
        """Parameters in float64 as a transform stores them; rotations are orthogonal to float64
        accuracy."""
        return {name: form.exported() for name, form in zip(self.kinds, self.forms)}

    def optimizer(self, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """Adam (Riemannian for rotations), with one parameter group and learning rate per kind."""
        by_kind = {
            kind: [p for form, of in zip(self.forms, self.kinds.values()) if of == kind for p in form.parameters()]
            for kind in KINDS
        }
        groups = [
            {"params": parameters, "lr": rates[kind], "initial_lr": rates[kind]}
            for kind, parameters in by_kind.items()
            if parameters
        ]
        return geoopt.optim.RiemannianAdam(groups)
