"""Factorizations in float32: accepted where they are accurate, repeated in float64 where they are not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from mitigation_cases import INT4, N, energy, inputs, normal, paired_inputs, rows_that_differ, weight_of
from quantgrid.calibration.statistics import stack
from quantgrid.ground.errors import NumericalFailure
from quantgrid.mitigations.methods.caldera import caldera
from quantgrid.mitigations.methods.gptaq import gptaq
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.qep import qep
from quantgrid.mitigations.methods.qronos import qronos
from quantgrid.mitigations.solvers.precision import TOLERANCE, checked, distance
from quantgrid.mitigations.solvers.singular import deviation
from reference_statistics import statistics_of

METHODS = {
    "gptq": (gptq, ["factor_dtype"]),
    "gptq, ordered": (partial(gptq, activation_order=True), ["factor_dtype"]),
    "low_rank": (partial(low_rank, rank=8), ["svd_dtype"]),
    "qera": (partial(low_rank, rank=8, metric="qera_exact"), ["ridge_dtype", "svd_dtype"]),
    "caldera": (partial(caldera, rank=8, iterations=2), ["factor_dtype", "ridge_dtype", "svd_dtype"]),
    "gptaq": (gptaq, ["factor_dtype"]),
    "qep": (qep, ["correction_dtype", "factor_dtype"]),
    "qronos": (qronos, ["correction_dtype", "factor_dtype"]),
}
_, _, PAIRED = paired_inputs()
PAIRED = stack([PAIRED, PAIRED])
WEIGHT = torch.stack([weight_of(), weight_of(5)])


def in_float32(statistics):
    return replace(statistics, solver_dtype=torch.float32, memory={})


@pytest.mark.parametrize("name", METHODS)
def test_float32_gives_nearly_the_codes_of_float64(name):
    method, dtypes = METHODS[name]
    wide, narrow = method(WEIGHT, PAIRED, INT4), method(WEIGHT, in_float32(PAIRED), INT4)
    assert {key: narrow.details[key] for key in dtypes} == {key: ["float32"] * 2 for key in dtypes}
    assert not {key for key in wide.details if key.endswith("_dtype")}
    moment = PAIRED.second_moment[0]
    errors = [energy(WEIGHT[0] - solved.dequantized()[0], moment) for solved in (wide, narrow)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert rows_that_differ(wide, narrow) <= 8


@pytest.mark.parametrize(
    "method",
    [partial(gptq, damping=0.0), partial(qep, correction_damping=0.0), partial(low_rank, rank=8, metric="qera_exact")],
    ids=["gptq", "qep", "qera"],
)
def test_what_float32_cannot_factorize_is_repeated_in_float64(method):
    """Two tokens for 96 channels, undamped: rank 2."""
    x = inputs(tokens=2)
    statistics = replace(PAIRED, second_moment=stack([statistics_of(x)] * 2).second_moment, memory={})
    wide, narrow = method(WEIGHT, statistics, INT4), method(WEIGHT, in_float32(statistics), INT4)
    used = {key: values for key, values in narrow.details.items() if key.endswith("_dtype")}
    assert "float64" in {name for values in used.values() for name in values}
    for key in ("damping", "ridge"):
        assert narrow.details.get(key) == wide.details.get(key), "damping is the one of float64"


def test_an_inaccurate_result_is_repeated():
    asked = []

    def solve(dtype):
        asked.append(dtype)
        return torch.tensor(1.0, dtype=dtype)

    assert checked(torch.float32, solve, lambda found: 2 * TOLERANCE)[1] == "float64"
    assert checked(torch.float32, solve, lambda found: float("nan"))[1] == "float64"
    assert checked(torch.float32, solve, lambda found: TOLERANCE / 2) == (torch.tensor(1.0), "float32")
    assert asked == [torch.float32, torch.float64, torch.float32, torch.float64, torch.float32]


def test_float64_is_not_checked():
    found, name = checked(torch.float64, lambda dtype: dtype, lambda _: pytest.fail("checked"))
    assert (found, name) == (torch.float64, "float64")


@pytest.mark.parametrize("error", [NumericalFailure("no"), torch.linalg.LinAlgError("no")])
def test_a_failure_in_float32_alone_is_repeated(error):
    def solve(dtype):
        if dtype == torch.float32:
            raise error
        return dtype

    assert checked(torch.float32, solve, lambda _: 0.0) == (torch.float64, "float64")


def test_errors_of_vectors_are_relative_to_each():
    wanted = torch.tensor([[1.0, 100.0, 0.0], [0.0, 0.0, 0.0]])
    assert distance(wanted + torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), wanted) == pytest.approx(0.01)
    assert distance(wanted + torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]), wanted) == pytest.approx(0.5)


def test_vectors_outside_of_the_leading_space_deviate():
    matrix = normal(24, N)
    exact = torch.linalg.svd(matrix)[0][:, :4]
    assert deviation(matrix, exact) < 1e-12
    assert deviation(matrix, 1.1 * exact) > 0.1
    assert deviation(matrix, torch.linalg.qr(normal(24, 4, seed=9))[0]) > 0.1
    assert deviation(torch.zeros(24, N), exact.float()) < 1e-5
