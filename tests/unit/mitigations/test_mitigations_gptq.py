"""Variants of GPTQ: running scales, MR-GPTQ, GPTAQ, damping of singular matrices; and a toolkit's
codes on the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mitigation_cases import (
    SCHEMES,
    N,
    damped,
    energy,
    inputs,
    normal,
    paired_inputs,
    plain_gptq,
    recorded_gaps,
    rows_that_differ,
    weight_of,
    with_moment,
)
from quantgrid.calibration.statistics import PairedStatistics, stack
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT
from quantgrid.mitigations.methods.bases import solve_base
from quantgrid.mitigations.methods.gptaq import cross_term_of, gptaq
from quantgrid.mitigations.methods.gptq import gptq, inverse_factor
from quantgrid.mitigations.methods.mr_gptq import mr_gptq
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.quantizer import find_parameters, quantize
from quantgrid.quantizer.rounding import round_values
from quantgrid.quantizer.tensors import step_size, zero_points
from quantgrid.schemes import scheme
from reference_statistics import statistics_of

GROUPED = [name for name, of_scheme in SCHEMES.items() if of_scheme.granularity == "group"]
VECTORS = ROOT / "tests" / "data" / "gptq-vectors.safetensors"


# -- running scales --------------------------------------------------------------------------------


def plain_running(weight, moment, of_scheme, damping=0.01):
    """Column by column in float64: at the first column of a group its parameters from the working
    copy; (rounded, scales of the groups)."""
    n, size = weight.shape[1], of_scheme.group_size
    inverse = np.linalg.inv(damped(moment, damping).numpy())
    fixed = find_parameters(weight, of_scheme).global_scale
    working, rounded, scales = weight.double().numpy().copy(), np.empty(weight.shape), []
    for i in range(n):
        if i % size == 0:
            found = find_parameters(torch.from_numpy(working[:, i : i + size]).float(), of_scheme, fixed)
            scales.append(found.scale)
            step, zero = (
                step_size(found, of_scheme, (len(weight), size)),
                zero_points(found, of_scheme, (len(weight), size)),
            )
        rounded[:, i] = round_values(torch.from_numpy(working[:, i : i + 1].copy()), step, zero, of_scheme).numpy()[
            :, 0
        ]
        error = (working[:, i] - rounded[:, i]) / inverse[i, i]
        working[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
        inverse = inverse - np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return rounded, torch.cat(scales, -1)


@pytest.mark.parametrize("block_size", [1, 16, 40, 128])
@pytest.mark.parametrize("name", [name for name in GROUPED if "kmeans" not in name])
def test_running_scales_are_those_of_the_working_copy(name, block_size):
    weight, statistics = weight_of(), statistics_of(inputs())
    rounded, scales = plain_running(weight, statistics.second_moment, SCHEMES[name])
    solved = gptq(weight, statistics, SCHEMES[name], scales="running", block_size=block_size)
    same_scales = (solved.quantized.scale.float() - scales.float()).abs() <= 1e-4 * scales.float().abs()
    assert same_scales.float().mean() > 0.97
    close = (solved.dequantized() - torch.from_numpy(rounded)).abs() <= 1e-3 * weight.abs().amax(1, keepdim=True)
    assert close.float().mean() > 0.97
    if SCHEMES[name].scale_format != "e8m0":  # whose powers of two stay what they were
        assert not torch.equal(
            solved.quantized.scale.float(), gptq(weight, statistics, SCHEMES[name]).quantized.scale.float()
        )


@pytest.mark.parametrize("name", SCHEMES)
def test_the_sum_of_errors_is_the_layer_error_with_running_scales(name, monkeypatch):
    gaps = recorded_gaps(monkeypatch)
    weight, statistics = weight_of(), statistics_of(inputs())
    solved = gptq(weight, statistics, SCHEMES[name], scales="running")
    hessian = damped(statistics.second_moment)
    upper = np.linalg.cholesky(np.linalg.inv(hessian.numpy())).T
    total = sum((gap / upper[i, i]).square().sum().item() for i, gap in enumerate(gaps))
    assert len(gaps) == N and math.isclose(total, energy(solved.dequantized() - weight, hessian), rel_tol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_diagonal_moment_is_round_to_nearest_with_running_scales(name):
    weight, diagonal = weight_of(), with_moment(torch.diag(normal(N, seed=3).square() + 0.01))
    solved, nearest = gptq(weight, diagonal, SCHEMES[name], scales="running"), rtn(weight, None, SCHEMES[name])
    assert torch.equal(solved.quantized.codes, nearest.quantized.codes) and torch.equal(
        solved.dequantized(), nearest.dequantized()
    )


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in GROUPED])
def test_without_groups_running_scales_are_static(name):
    weight, statistics = weight_of(), statistics_of(inputs())
    running, static = (gptq(weight, statistics, SCHEMES[name], scales=scales) for scales in ("running", "static"))
    assert torch.equal(running.quantized.codes, static.quantized.codes) and torch.equal(
        running.dequantized(), static.dequantized()
    )


@pytest.mark.parametrize("name", ["int4 group-16", "nvfp4", "mxfp4"])
def test_running_scales_of_a_batch_are_one_by_one(name):
    weights, statistics = [weight_of(seed) for seed in (0, 10)], [statistics_of(inputs(seed)) for seed in (0, 10)]
    together = gptq(torch.stack(weights), stack(statistics), SCHEMES[name], scales="running")
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        alone = gptq(weight, alone, SCHEMES[name], scales="running")
        assert int((together.quantized.codes[i] != alone.quantized.codes).any(-1).sum()) <= 2


def test_running_scales_leave_no_activation_order():
    with pytest.raises(ConfigError, match="static"):
        gptq(weight_of(), statistics_of(inputs()), SCHEMES["nvfp4"], scales="running", activation_order=True)


# -- MR-GPTQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp4", "int4 group-16"])
def test_mr_gptq_is_gptq_in_activation_order_with_searched_block_scales(name):
    weight, statistics = weight_of(), statistics_of(inputs())
    searched = SCHEMES[name] if "int4" in name else replace(SCHEMES[name], range="mse")
    wanted = gptq(weight, statistics, searched, activation_order=True)
    found = mr_gptq(weight, statistics, SCHEMES[name])
    assert torch.equal(found.quantized.codes, wanted.quantized.codes) and torch.equal(
        found.dequantized(), wanted.dequantized()
    )
    plain = mr_gptq(weight, statistics, SCHEMES[name], block_scales="minmax").quantized
    assert "int4" in name or bool(
        (plain.scale.float() != found.quantized.scale.float()).any()
    )  # the search finds other scales
    assert torch.equal(plain.codes, gptq(weight, statistics, SCHEMES[name], activation_order=True).quantized.codes)
    order = statistics.second_moment.diagonal().argsort(descending=True)
    assert (
        int(
            (found.quantized.codes != plain_gptq(weight, statistics.second_moment, searched, order=order).codes)
            .any(-1)
            .sum()
        )
        <= 1
    )


def test_mr_gptq_keeps_a_search_that_the_scheme_brings():
    weight, statistics = weight_of(), statistics_of(inputs())
    found, wanted = (
        mr_gptq(weight, statistics, SCHEMES["exhaustive"]),
        gptq(weight, statistics, SCHEMES["exhaustive"], activation_order=True),
    )
    assert torch.equal(found.dequantized(), wanted.dequantized())


# -- GPTAQ -----------------------------------------------------------------------------------------


def plain_gptaq(weight, statistics, of_scheme, alpha, order=None):
    """The update of arXiv 2504.02692, column by column in float64 numpy, the P of its algorithm
    from whole matrices."""
    order = np.arange(N) if order is None else order.numpy()
    square = np.ix_(order, order)
    inverse = np.linalg.inv(damped(statistics.second_moment).numpy()[square])
    upper = np.linalg.cholesky(inverse).T
    cross_term = alpha * np.triu(statistics.cross.numpy()[square] @ upper.T, 1) @ upper
    parameters = find_parameters(weight, of_scheme)
    steps = step_size(parameters, of_scheme, weight.shape)
    steps = steps.repeat_interleave(N // steps.shape[-1], -1)
    working, rounded = weight.double().numpy()[:, order].copy(), np.empty(weight.shape)
    for i, column in enumerate(order):
        w = working[:, i].copy()
        rounded[:, i] = round_values(
            torch.from_numpy(w[:, None].copy()), steps[:, column, None], None, of_scheme
        ).numpy()[:, 0]
        working[:, i + 1 :] += np.outer(w, cross_term[i, i + 1 :]) - np.outer(
            (w - rounded[:, i]) / upper[i, i], upper[i, i + 1 :]
        )
    result = np.empty(weight.shape)
    result[:, order] = rounded
    return quantize(torch.from_numpy(result).float(), of_scheme, parameters)


@pytest.mark.parametrize("block_size", [1, 40, 128])
@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("name", ["int4", "int4 group-16", "nvfp4"])
def test_gptaq_agrees_with_a_plain_loop(name, ordered, block_size):
    weight, (_, _, statistics) = weight_of(), paired_inputs()
    order = statistics.second_moment.diagonal().argsort(descending=True) if ordered else None
    wanted = plain_gptaq(weight, statistics, SCHEMES[name], 0.25, order)
    found = gptaq(weight, statistics, SCHEMES[name], activation_order=ordered, block_size=block_size).quantized
    assert int((found.codes != wanted.codes).any(-1).sum()) <= 1
    assert (found.codes != gptq(weight, statistics, SCHEMES[name], activation_order=ordered).quantized.codes).any()


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_gptaq_without_a_difference_is_gptq(name):
    weight, (x, _, statistics) = weight_of(), paired_inputs()
    wanted = gptq(weight, statistics_of(x), SCHEMES[name])
    for same in (
        gptaq(weight, statistics, SCHEMES[name], alpha=0.0),
        gptaq(weight, replace(statistics, cross=torch.zeros(N, N)), SCHEMES[name]),
    ):
        assert torch.equal(same.quantized.codes, wanted.quantized.codes) and same.details == wanted.details


def test_gptaq_comes_closer_to_the_full_precision_output():
    """|Q X - W X*| over several layers, which GPTQ does not look at."""
    ratios = []
    for seed in range(0, 60, 10):
        weight, (x, wanted, statistics) = weight_of(seed), paired_inputs(seed)
        left = [
            ((solved.dequantized().double() @ x.T - weight.double() @ wanted.T).square().sum().item())
            for solved in (gptaq(weight, statistics, SCHEMES["int4"]), gptq(weight, statistics, SCHEMES["int4"]))
        ]
        ratios.append(left[0] / left[1])
    assert np.mean(ratios) < 0.9 and max(ratios) < 1.02


def test_gptaq_of_a_batch_is_one_by_one():
    weights, statistics = [weight_of(seed) for seed in (0, 10)], [paired_inputs(seed)[2] for seed in (0, 10)]
    together = gptaq(torch.stack(weights), stack(statistics), SCHEMES["int4"])
    for i, (weight, alone) in enumerate(zip(weights, statistics)):
        assert (
            int((together.quantized.codes[i] != gptaq(weight, alone, SCHEMES["int4"]).quantized.codes).any(-1).sum())
            <= 1
        )


def test_gptaq_wants_pairs_and_ignores_dead_inputs():
    with pytest.raises(ConfigError, match="sequential"):
        gptaq(weight_of(), statistics_of(inputs()), SCHEMES["int4"])
    _, _, statistics = paired_inputs()
    moment, cross = statistics.second_moment.clone(), statistics.cross.clone()
    moment[5], moment[:, 5] = 0, 0
    factor, _ = inverse_factor(damped(moment), 0.0)
    assert (cross_term_of(replace(statistics, second_moment=moment, cross=cross), factor.float(), None)[5] == 0).all()
    assert (
        gptaq(weight_of(), replace(statistics, second_moment=moment), SCHEMES["int4"]).dequantized()[:, 5] == 0
    ).all()


# -- bad matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [gptq, mr_gptq, gptaq])
@pytest.mark.parametrize("condition", [1e4, 1e8, 1e14])
def test_badly_conditioned_moments_stay_below_rounding(method, condition):
    """Eigenvalues from 1 to 1/condition; the layer error on the moment itself."""
    basis, weight = torch.linalg.qr(normal(N, N, seed=5)).Q, weight_of()
    moment = basis @ torch.diag(torch.logspace(0, -math.log10(condition), N, dtype=torch.float64)) @ basis.T
    bare = with_moment(moment)
    paired = PairedStatistics(
        *(
            getattr(bare, name)
            for name in ("count", "mean", "second_moment", "mean_absolute", "minimum", "maximum", "samples")
        ),
        cross=torch.zeros(N, N, dtype=torch.float64),
    )
    solved = method(weight, paired, SCHEMES["int4"])
    assert solved.details == {"damping": [0.01]}
    assert energy(solved.dequantized() - weight, moment) < 0.7 * energy(
        rtn(weight, None, SCHEMES["int4"]).dequantized() - weight, moment
    )


@pytest.mark.parametrize("base, same", [("rtn", lambda w, s, q: rtn(w, s, q)), ("gptq", gptq), ("mr_gptq", mr_gptq)])
def test_a_base_is_the_method_of_its_name(base, same):
    weight, statistics = weight_of(), statistics_of(inputs())
    assert torch.equal(
        solve_base(base, weight, statistics, SCHEMES["nvfp4"]).dequantized(),
        same(weight, statistics, SCHEMES["nvfp4"]).dequantized(),
    )


# -- a toolkit on the same numbers -----------------------------------------------------------------

PEERS = {
    "int4-channel": scheme("int4"),
    "int4-group": scheme("int4", group_size=64),
    "int4-asymmetric-group": scheme("int4_asym", group_size=64),
}


@pytest.mark.parametrize("order", [False, True], ids=["in order", "static activation order"])
@pytest.mark.parametrize("name", PEERS)
def test_codes_are_those_of_llm_compressor(name, order):
    """``tests/record_gptq_vectors.py`` ran its ``quantize_weight`` with our static scales on this
    second moment."""
    vectors, of_scheme = load_file(VECTORS), PEERS[name]
    weight, moment = vectors["weight"], vectors["second_moment"].double()
    found = gptq(weight, with_moment(moment), of_scheme, activation_order=order).quantized
    wanted = vectors[f"{name}.{'ordered' if order else 'in-order'}"].int() + (0 if of_scheme.symmetric else 8)
    assert (found.codes == wanted).float().mean() >= 0.999
    assert rows_that_differ(rtn(weight, None, of_scheme), gptq(weight, with_moment(moment), of_scheme)) == len(weight)
