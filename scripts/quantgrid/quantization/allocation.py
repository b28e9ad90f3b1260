"""Allocation of bits: one scheme per group of linears, by the divergence that their errors predict.

The divergence of a model is predicted by the sum over its linears of E‖g‖²/m · E‖e‖² / 2
(``calibration.sensitivity``), additive while it is small. Choosing one scheme per group for the smallest
sum within a number of stored bits is a multiple-choice knapsack; scipy's ``milp`` (HiGHS) solves it.

Relative errors are those of the transformed linears, E‖y‖² is that of the original ones. A transform that moves a
bias of a norm, a shift or the mean of the stream out of an output leaves a smaller one, so the prediction is too
large: behind R1 by 1 to 5 % (o, down) and 14 to 24 % (other linears) in tiny OPT and GPT-NeoX models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack

from ..ground.errors import NumericalFailure

GAP = 1e-4  # relative distance to the optimum at which the solver stops
FRONT = 13  # budgets of the front of predicted divergence against bits
_SCALE = 1e6  # of objectives and limits, far above the solver's absolute tolerances


@dataclass(frozen=True)
class Table:
    """Predicted divergence (nats per token) and stored bits of every group under every candidate.

    ``divergence`` and ``bits`` are (groups, candidates), bits whole numbers; ``groups`` holds the linears
    (``0.q``) of each group, ``size`` the number of all weights, ``added`` the bits of the transform.
    """

    names: tuple[str, ...]
    groups: Sequence[Sequence[str]]
    divergence: np.ndarray
    bits: np.ndarray
    size: int
    added: int = 0

    @classmethod
    def of(
        cls,
        errors: Mapping[str, Any],
        sensitivities: Mapping[str, Mapping[str, float]],
        groups: Sequence[Sequence[str]],
    ) -> Table:
        """Table from ``scheme_errors`` and ``measure_sensitivities``; the linears of a group add up."""
        linears = errors["linears"]
        names = tuple(next(iter(linears.values()))["schemes"])
        divergence, bits = np.zeros((len(groups), len(names))), np.zeros((len(groups), len(names)), dtype=np.int64)
        for row, group in enumerate(groups):
            for linear in group:
                entry, found = linears[linear], sensitivities[linear]
                factor = found["share"] * found["gradient_square"] * found["output_square"] / 2
                divergence[row] += [factor * entry["schemes"][name]["output_error"] for name in names]
                bits[row] += [round(entry["schemes"][name]["stored_bits"] * entry["size"]) for name in names]
        size = sum(entry["size"] for entry in linears.values())
        return cls(names, groups, divergence, bits, size, math.ceil(errors["added_bits"] * size))

    def sums(self, choice: Sequence[int]) -> tuple[float, int]:
        """(predicted divergence, stored bits) of one candidate per group, without those of the transform."""
        rows = np.arange(len(self.groups))
        return math.fsum(self.divergence[rows, choice]), int(self.bits[rows, choice].sum())

    def described(self, choice: Sequence[int]) -> dict[str, Any]:
        """A choice, ready for JSON: ``bits`` per weight with those of the transform, ``predicted_kl``, and
        ``schemes``, linear -> name of its candidate."""
        divergence, bits = self.sums(choice)
        named = {linear: self.names[chosen] for group, chosen in zip(self.groups, choice) for linear in group}
        return {"bits": (bits + self.added) / self.size, "predicted_kl": divergence, "schemes": named}

    def uniform(self) -> dict[str, tuple[int, ...]]:
        """Candidate -> the choice of that candidate for all groups."""
        return {name: (number,) * len(self.groups) for number, name in enumerate(self.names)}


def allocate(
    table: Table, budget: float | None, divergence: float | None = None, count: int = 1, gap: float = GAP
) -> list[tuple[int, ...]]:
    """The ``count`` best distinct choices of one candidate per group, the best first; fewer if there are fewer.

    With a ``budget`` (stored bits per weight, those of the transform included) the predicted divergence is
    smallest, else the bits for a predicted ``divergence`` of at most that. No choice is worse than a
    uniform one within the limit; equal ones are in the order of their names. Raises
    :class:`NumericalFailure` if no choice is within the limit.
    """
    if budget is not None:
        limit = math.floor(budget * table.size * (1 + 1e-12)) - table.added
        unit = reduce(math.gcd, map(int, table.bits.flat)) or 1
        minimized, limited, bound = table.divergence, table.bits / unit, float(limit // unit)
    else:
        unit = _SCALE / divergence  # type: ignore[operator]
        minimized, limited, bound = table.bits.astype(float), table.divergence * unit, _SCALE
    if limited.min(axis=1).sum() > bound:
        smallest = table.described(tuple(limited.argmin(axis=1)))
        raise NumericalFailure(
            f"no allocation is within the limit: the smallest has {smallest['bits']:.4g} stored bits per weight and a "
            f"predicted divergence of {smallest['predicted_kl']:.3g}"
        )
    solver = _Solver(minimized, limited, bound, gap)
    found = [*solver.best(count), *(choice for choice in table.uniform().values() if solver.is_within(choice))]
    ranked = sorted(dict.fromkeys(found), key=lambda choice: (solver.value(choice), [table.names[i] for i in choice]))
    return ranked[:count]


class _Solver:
    """Choices of one column per row with the smallest sum of ``minimized`` under a limit of ``limited``."""

    def __init__(self, minimized: np.ndarray, limited: np.ndarray, bound: float, gap: float):
        self.minimized, self.limited, self.bound, self.gap = minimized, limited, bound, gap
        rows, columns = minimized.shape
        one_each = coo_array(
            (np.ones(rows * columns), (np.repeat(np.arange(rows), columns), np.arange(rows * columns)))
        )
        self.fixed = vstack([one_each, limited.reshape(1, -1)])
        self.low, self.high = np.append(np.ones(rows), -np.inf), np.append(np.ones(rows), bound)
        self.scale = _SCALE / max(minimized.max(axis=1).sum(), np.finfo(float).tiny)

    def value(self, choice: Sequence[int]) -> float:
        return math.fsum(self.minimized[np.arange(len(choice)), choice])

    def is_within(self, choice: Sequence[int]) -> bool:
        """Check whether ``choice`` is within the limit, up to rounding."""
        return math.fsum(self.limited[np.arange(len(choice)), choice]) <= self.bound * (1 + 1e-12)

    def best(self, count: int) -> list[tuple[int, ...]]:
        """The ``count`` best choices: each further one differs from all before in at least one row."""
        found: list[tuple[int, ...]] = []
        while len(found) < count and (choice := self._next(found)) is not None:
            found.append(choice)
        return found

    def _next(self, excluded: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        rows, columns = self.minimized.shape
        matrix, low, high = self.fixed, self.low, self.high
        for choice in excluded:
            cut = np.zeros((1, rows * columns))
            cut[0, np.arange(rows) * columns + choice] = 1
            matrix, low, high = vstack([matrix, cut]), np.append(low, -np.inf), np.append(high, rows - 1)
        solved = milp(
            self.minimized.ravel() * self.scale,
            integrality=np.ones(rows * columns),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": self.gap},
        )
        if solved.status == 2:  # infeasible: no choice is left
            return None
        if solved.x is None:
            raise NumericalFailure(f"the allocation was not solved: {solved.message}")
        return tuple(map(int, solved.x.reshape(rows, columns).argmax(axis=1)))


def front(table: Table, count: int = FRONT) -> list[dict[str, float]]:
    """Best predicted divergence at ``count`` budgets from the smallest to the largest candidate, in bits
    per weight: the front of all allocations."""
    low, high = ((bits + table.added) / table.size for bits in (table.bits.min(1).sum(), table.bits.max(1).sum()))
    found = []
    for step in range(count):
        choice = allocate(table, high if step == count - 1 else low + (high - low) * step / (count - 1) + 1e-9)[0]
        described = table.described(choice)
        found.append({name: described[name] for name in ("bits", "predicted_kl")})
    return found
