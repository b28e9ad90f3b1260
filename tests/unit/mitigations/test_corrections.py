"""Tests of QEP and Qronos: their definitions column by column, their limits, and the objective that both lower."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch

from mitigation_cases import SCHEMES, TOKENS, M, N, damped, inputs, normal, paired_inputs, rows_that_differ, weight_of
from quantgrid.calibration.statistics import PairedStatistics, stack
from quantgrid.ground.errors import ConfigError
from quantgrid.mitigations.methods.gptaq import gptaq
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.mr_gptq import mr_gptq
from quantgrid.mitigations.methods.qep import qep
from quantgrid.mitigations.methods.qronos import qronos
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.quantizer import find_parameters, quantize
from quantgrid.quantizer.quantized_weight import Compensated
from quantgrid.quantizer.rounding import round_values
from quantgrid.quantizer.tensors import step_size
from reference_statistics import statistics_of

INT4 = SCHEMES["int4"]
LIVING = torch.arange(N) >= 8  # inputs that do not become zero


def objective(weight, solved, x, wanted) -> float:
    """Squared error of the output on ``x`` against that of the weight on ``wanted``."""
    error = solved.dequantized().double() @ x.T - weight.double() @ wanted.T
    return error.square().sum().item()


def statistics_of_pair(x, wanted) -> PairedStatistics:
    """Statistics of ``x`` (tokens, N), ``wanted`` in the full-precision model."""
    found = statistics_of(x)
    names = (field.name for field in fields(found) if field.init)
    return PairedStatistics(**{name: getattr(found, name) for name in names}, cross=(wanted - x).T @ x / len(x))


def naive_qronos(weight, statistics, of_scheme, order) -> Compensated:
    """arXiv 2505.11695 column by column in float64: round the best value of a column, then solve the later
    columns again by least squares from all that was rounded. Columns of dead inputs are zero."""
    square = np.ix_(order, order)
    diagonal = statistics.second_moment.diagonal()
    filled = statistics.second_moment + torch.diag((diagonal <= 0) * diagonal[diagonal > 0].mean())
    moment = damped(filled).numpy()[square]
    cross = statistics.cross.numpy()[square]
    living = diagonal.numpy()[order] > 0
    steps = step_size(find_parameters(weight, of_scheme), of_scheme, weight.shape)
    steps = steps.repeat_interleave(N // steps.shape[-1], -1)
    original = weight.double().numpy()[:, order]
    working = original * living
    wanted = working @ moment + original @ cross
    for i, column in enumerate(order):
        rest = working.copy()
        rest[:, i] = 0
        best = (wanted[:, i] - rest @ moment[:, i]) / moment[i, i]
        values = torch.from_numpy(best[:, None].copy())
        working[:, i] = round_values(values, steps[:, column, None], None, of_scheme).numpy()[:, 0]
        if i + 1 < N:
            left = wanted[:, i + 1 :] - working[:, : i + 1] @ moment[: i + 1, i + 1 :]
            working[:, i + 1 :] = np.linalg.solve(moment[i + 1 :, i + 1 :], left.T).T
    result = np.empty(weight.shape)
    result[:, order] = working
    return Compensated(quantize(torch.from_numpy(result).float(), of_scheme, find_parameters(weight, of_scheme)))


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("name", ["int4", "int4 group-16", "nvfp4"])
def test_qronos_is_its_definition_column_by_column(name, ordered):
    weight, (_, _, statistics) = weight_of(), paired_inputs()
    diagonal = statistics.second_moment.diagonal()
    order = diagonal.argsort(descending=True).numpy() if ordered else np.arange(N)
    wanted = naive_qronos(weight, statistics, SCHEMES[name], order)
    found = qronos(weight, statistics, SCHEMES[name], activation_order=ordered)
    assert rows_that_differ(found, wanted) <= 1
    assert rows_that_differ(found, gptq(weight, statistics, SCHEMES[name], activation_order=ordered)) > 10


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "activation order"])
def test_qronos_makes_up_for_inputs_that_became_zero(ordered):
    x, wanted, _ = paired_inputs()
    weight, statistics = weight_of(), statistics_of_pair(x * LIVING, wanted)
    order = (
        statistics.second_moment.diagonal().argsort(descending=True, stable=True).numpy() if ordered else np.arange(N)
    )
    found = qronos(weight, statistics, INT4, activation_order=ordered)
    assert rows_that_differ(found, naive_qronos(weight, statistics, INT4, order)) <= 1
    assert (found.dequantized()[:, :8] == 0).all()


@pytest.mark.parametrize("ordered", [False, True])
def test_without_a_difference_of_inputs_both_are_gptq(ordered):
    weight, (_, _, statistics) = weight_of(), paired_inputs()
    same = replace(statistics, cross=torch.zeros(N, N, dtype=torch.float64))
    wanted = gptq(weight, same, INT4, activation_order=ordered)
    assert rows_that_differ(qronos(weight, same, INT4, activation_order=ordered), wanted) <= 1
    assert torch.equal(qep(weight, same, INT4, activation_order=ordered).quantized.codes, wanted.quantized.codes)


@pytest.mark.parametrize(
    ("base", "method"), [("rtn", rtn), ("gptq", gptq), ("mr_gptq", mr_gptq)], ids=["rtn", "gptq", "mr_gptq"]
)
def test_without_correction_qep_is_its_base(base, method):
    weight, (_, _, statistics) = weight_of(), paired_inputs()
    found = qep(weight, statistics, SCHEMES["nvfp4"], correction=0.0, base=base)
    wanted = method(weight, statistics, SCHEMES["nvfp4"])
    assert torch.equal(found.dequantized(), wanted.dequantized())


@pytest.mark.parametrize("dead", [False, True], ids=["all living", "some zero"])
def test_the_correction_is_that_of_least_squares(dead):
    """In full: the weight whose output on the inputs is closest to the wanted one, which the pseudo-inverse
    gives."""
    weight, (x, wanted, statistics) = weight_of(), paired_inputs()
    if dead:
        x = x * LIVING
        statistics = statistics_of_pair(x, wanted)
    best = (torch.linalg.pinv(x) @ wanted @ weight.double().T).T
    best = torch.where(statistics.second_moment.diagonal() > 0, best, weight.double())
    for correction in (1.0, 0.5):
        target = (1 - correction) * weight.double() + correction * best
        found = qep(weight, statistics, SCHEMES["int8"], correction, correction_damping=0.0, base="rtn")
        half_step = find_parameters(target.float(), SCHEMES["int8"]).scale.double() / 2
        assert ((found.dequantized().double() - target).abs() <= half_step * 1.001).all()


def test_corrections_lower_the_error_of_the_output():
    """The order of the published comparison: GPTQ, GPTAQ, then QEP in full and Qronos."""
    ratios = []
    for seed in range(0, 60, 10):
        weight, (x, wanted, statistics) = weight_of(seed), paired_inputs(seed)
        plain = objective(weight, gptq(weight, statistics, INT4), x, wanted)
        ratios.append(
            [
                objective(weight, solved, x, wanted) / plain
                for solved in (
                    gptaq(weight, statistics, INT4),
                    qep(weight, statistics, INT4, correction=1.0, correction_damping=0.01),
                    qronos(weight, statistics, INT4, activation_order=False),
                    qep(weight, statistics, INT4),
                )
            ]
        )
    aware, full, exact, half = np.mean(ratios, 0)
    assert full < aware < 1 and exact < aware and half < 1


def test_qronos_is_qep_in_full_but_for_the_first_column():
    """Inputs that are weakly correlated, hardly any damping: four of five codes are equal, and the errors of the
    outputs within 2 %."""
    equal, ratios = [], []
    for seed in range(0, 60, 10):
        weight = normal(M, N, seed=seed).float()
        x = normal(TOKENS, N, seed=seed + 1) @ (torch.eye(N) + 0.3 * normal(N, N, seed=seed + 2) / N**0.5)
        wanted = x + 0.3 * normal(TOKENS, N, seed=seed + 3)
        statistics = statistics_of_pair(x, wanted)
        full = qep(weight, statistics, INT4, correction=1.0, correction_damping=1e-4, damping=1e-4)
        exact = qronos(weight, statistics, INT4, damping=1e-4, activation_order=False)
        equal.append((full.quantized.codes == exact.quantized.codes).double().mean().item())
        ratios.append(objective(weight, exact, x, wanted) / objective(weight, full, x, wanted))
    assert np.mean(equal) > 0.8
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "method",
    [gptq, gptaq, partial(qep, correction_damping=0.0), qronos],
    ids=["gptq", "gptaq", "qep", "qronos"],
)
def test_equal_inputs_without_damping_are_solved(method):
    """A factorization that fails is repeated with more damping, which the details name."""
    for seed in range(0, 100, 10):
        x, wanted, _ = paired_inputs(seed)
        x[:, 40] = x[:, 70]
        solved = method(weight_of(seed), statistics_of_pair(x, wanted), INT4, damping=0.0)
        assert torch.isfinite(solved.dequantized()).all()
        assert {key for key in solved.details if key.endswith("damping")} <= {"damping", "correction_damping"}


def test_a_batch_is_one_by_one():
    weights, statistics = zip(*((weight_of(seed), paired_inputs(seed)[2]) for seed in (0, 10)))
    for method in (qep, qronos):
        together = method(torch.stack(weights), stack(statistics), INT4).quantized.codes
        for one, (weight, alone) in zip(together, zip(weights, statistics)):
            assert int((one != method(weight, alone, INT4).quantized.codes).any(-1).sum()) <= 1


@pytest.mark.parametrize("method", [qep, qronos])
def test_pairs_are_needed_and_dead_inputs_change_nothing(method):
    with pytest.raises(ConfigError, match="set propagation to 'sequential'"):
        method(weight_of(), statistics_of(inputs()), INT4)
    _, _, statistics = paired_inputs()
    moment, cross = statistics.second_moment.clone(), statistics.cross.clone()
    moment[5], moment[:, 5] = 0, 0
    dead = replace(statistics, second_moment=moment, cross=cross, memory={})
    found = method(weight_of(), dead, INT4).dequantized()
    again = method(weight_of(), replace(dead, cross=cross + normal(N, N) * (torch.arange(N) == 5)), INT4).dequantized()
    assert (found[:, 5] == 0).all() and torch.equal(found, again)
