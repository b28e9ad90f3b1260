"""Residual columns: which columns get second codes, what these are worth, and the bytes that they take."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mitigation_cases import INT4, SCHEMES, M, N, energy, inputs, normal, roundtrip, weight_of
from quantgrid.calibration.statistics import stack
from quantgrid.mitigations.methods.bases import solve_base
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.residual_columns import affordable_columns, magnitudes, parts, residual_columns
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.mitigations.methods.sparse_outliers import sparse_outliers
from quantgrid.quantization.code_storage import code_tensors
from quantgrid.quantization.compensation_storage import residual_bits, side_bits, side_tensors
from quantgrid.quantization.layer_errors import accounted_bits
from quantgrid.quantizer import quantize
from quantgrid.quantizer.tensors import step_size
from quantgrid.schemes import scheme
from reference_statistics import statistics_of

ALL = 100  # a rank whose bytes are enough for second codes of every column


def steps_of(residual):
    """Step of every second code (m, r)."""
    found = []
    for part in residual.parts:
        steps = step_size(part.parameters, part.scheme, part.codes.shape)
        found.append(steps.repeat_interleave(part.codes.shape[-1] // steps.shape[-1], -1))
    return torch.cat(found, -1)


@pytest.mark.parametrize("base", ["rtn", "gptq", "mr_gptq"])
def test_without_a_rank_it_is_the_base(base):
    weight, statistics = weight_of(), statistics_of(inputs())
    found, wanted = (
        residual_columns(weight, statistics, INT4, rank=0, base=base),
        solve_base(base, weight, statistics, INT4),
    )
    assert found.residual is None and torch.equal(found.quantized.codes, wanted.quantized.codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_second_codes_of_every_column_round_what_the_first_leave(name):
    weight, scheme = weight_of(), SCHEMES[name]
    found = residual_columns(weight, statistics_of(inputs()), scheme, rank=ALL)
    first = quantize(weight, scheme).dequantize()
    assert torch.equal(found.residual.columns, torch.arange(N))
    assert torch.equal(found.dequantized(), first + quantize(weight - first, scheme).dequantize())


@pytest.mark.parametrize("order", ["maximum", "second_moment"])
def test_columns_are_those_of_the_largest_inputs(order):
    x = inputs()
    found = residual_columns(weight_of(), statistics_of(x), INT4, rank=1, order=order)
    sizes = x.abs().amax(0) if order == "maximum" else x.square().mean(0)
    assert torch.allclose(magnitudes(statistics_of(x), order).double(), sizes, rtol=1e-5)
    chosen = torch.zeros(N, dtype=torch.bool).index_fill(0, found.residual.columns, True)
    assert 0 < int(chosen.sum()) < N and sizes[chosen].min() >= sizes[~chosen].max() * (1 - 1e-5)


def test_behind_inputs_of_equal_size_the_order_of_those_before_has_the_smaller_error():
    x = inputs() * normal(N, seed=5).exp()
    before, scheme = statistics_of(x), SCHEMES["int4 group-16"]
    flat, weight = before.transformed(1 / before.maximum_absolute), (weight_of() * before.maximum_absolute).float()
    errors = {}
    for name, statistics in {"before": flat, "ties": replace(flat, scaling=None)}.items():
        found = residual_columns(weight, statistics, scheme, rank=3)
        errors[name] = energy(weight - found.dequantized(), flat.second_moment)
    assert errors["before"] < 0.75 * errors["ties"]


@pytest.mark.parametrize("name", ["int4", "int4 group-16", "mxfp4", "int4 asymmetric group-32"])
def test_no_entry_of_these_columns_errs_more_than_half_a_step_of_the_second_codes(name):
    weight, scheme = weight_of(), SCHEMES[name]
    found = residual_columns(weight, statistics_of(inputs()), scheme, rank=8)
    columns = found.residual.columns
    error = (weight - found.dequantized())[:, columns].abs()
    steps = steps_of(found.residual)
    if scheme.element_format.kind == "float":  # distances from 4 to 6 are 2 steps, and the OCP scale clips 6 to 8
        steps = 4 * steps
    assert (error <= 0.5 * steps * (1 + 1e-5) + 1e-6).all()
    bare = (weight - rtn(weight, None, scheme).dequantized())[:, columns].abs()
    assert error.square().sum() < bare.square().sum() / 20


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "int4 asymmetric group-32"])
@pytest.mark.parametrize("rank", [0, 1, 4, 24])
def test_they_take_the_bytes_of_a_rank_and_no_more(name, rank):
    scheme, budget = SCHEMES[name], 16 * rank * (M + N)
    count = affordable_columns(rank, torch.Size([M, N]), scheme)
    fits = [residual_bits(M, parts(number, scheme)) <= budget for number in range(N + 1)]
    assert count == max(number for number in range(N + 1) if fits[number])


STUDIED = {
    "int4 group-64": scheme("int4", group_size=64),
    "int4 group-128": scheme("int4", group_size=128),
    "int4": INT4,
    "int4 asymmetric group-64": scheme("int4_asym", group_size=64),
    "mxfp4": SCHEMES["mxfp4"],
    "nvfp4": SCHEMES["nvfp4"],
}


@pytest.mark.parametrize("shape", [(128, 128), (384, 128), (128, 384), (127, 384)], ids=str)
@pytest.mark.parametrize("name", STUDIED)
def test_the_bytes_of_a_rank_are_used_to_within_one_column(name, shape):
    """Against the bytes on disk, with shorter last groups and padded rows; 4-bit columns come in pairs."""
    (m, n), rank = shape, 8
    solved = residual_columns(weight_of(m=m, n=n)[None], stack([statistics_of(inputs(n=n))]), STUDIED[name], rank=rank)
    weight, _, bits = roundtrip(solved)
    budget, per_scale = 16 * rank * (m + n), 8 * m if STUDIED[name].element == "e2m1" else 36 * m
    assert torch.equal(weight, solved.dequantized()[0])
    assert bits == residual_bits(m, [(part.codes.shape[-1], part.scheme) for part in solved.residual.parts]) <= budget
    assert budget - bits < 8 * m + per_scale + 16 + 64
    assert solved.residual.columns.shape[-1] % 2 == 0


def test_columns_beyond_whole_groups_are_one_shorter_group():
    weight, statistics, scheme = weight_of(m=128, n=128), statistics_of(inputs(n=128)), STUDIED["int4 group-64"]
    residual = residual_columns(weight, statistics, scheme, rank=16).residual
    whole, rest = residual.parts
    assert (whole.codes.shape[-1], whole.scale.shape) == (64, (128, 1)) and whole.scheme == scheme
    assert 0 < rest.codes.shape[-1] < 64 and rest.scale.shape == (128, 1) and rest.scheme.granularity == "channel"
    left = (weight - rtn(weight, None, scheme).dequantized())[:, residual.columns]
    assert torch.equal(whole.codes, quantize(left[:, :64], scheme).codes)
    assert torch.allclose(rest.scale, left[:, 64:].abs().amax(-1, keepdim=True) / 7)


@pytest.mark.parametrize(
    "name",
    [
        "int3",
        "int4",
        "int4 asymmetric",
        "int4 asymmetric group-32",
        "int4 tensor",
        "unsigned",
        "nvfp4",
        "kmeans groups",
    ],
)
@pytest.mark.parametrize("rank", [5, 12, 24])
def test_they_come_back_from_disk_and_weigh_what_is_accounted(name, rank):
    weights = torch.stack([weight_of(0), weight_of(10)])
    statistics = stack([statistics_of(inputs(0)), statistics_of(inputs(10))])
    solved = residual_columns(weights, statistics, SCHEMES[name], rank=rank)
    assert solved.residual is not None
    for layer in range(2):
        weight, nothing, bits = roundtrip(solved, layer)
        assert nothing is None and torch.equal(weight, solved.dequantized()[layer])
        assert math.isclose(bits, side_bits(solved) * M * N, rel_tol=1e-9) and bits <= 16 * rank * (M + N)


@pytest.mark.parametrize("name", ["int4 asymmetric", "int4 asymmetric group-32", "unsigned"])
def test_zero_points_of_second_codes_count_in_both_numbers_of_bits(name):
    """Those of the main codes in the stored bits alone; all of them against the bytes on disk."""
    scheme = SCHEMES[name]
    solved = residual_columns(weight_of()[None], stack([statistics_of(inputs())]), scheme, rank=24)
    found, second = accounted_bits(solved, scheme), [code_tensors(part, 0) for part in solved.residual.parts]
    assert second and all(part["zero_point"].numel() > 0 for part in second)

    def bits(tensors):
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / (M * N)

    main, term = code_tensors(solved.quantized, 0), side_tensors(solved, 0)
    assert found["stored_bits"] == pytest.approx(bits(main) + bits(term), rel=1e-9)
    assert found["bits"] == pytest.approx(found["stored_bits"] - bits({"zero_point": main["zero_point"]}), rel=1e-9)


def test_at_equal_bytes_none_of_three_takes_more_and_each_lowers_the_error():
    """Inputs of a few large channels, as before a smoothing or a rotation."""
    x, weight = inputs(), weight_of()
    statistics, scheme = statistics_of(x), SCHEMES["int4 group-16"]
    bare, budget = rtn(weight, None, scheme), 16 * 3 * (M + N) / (M * N)
    solved = {
        "columns": residual_columns(weight, statistics, scheme, rank=3, order="second_moment"),
        "term": low_rank(weight, statistics, scheme, rank=3, metric="qera_exact"),
        "outliers": sparse_outliers(weight, statistics, scheme, rank=3, metric="qera_approx"),
    }
    plain = accounted_bits(bare, scheme)["stored_bits"]
    for found in solved.values():
        assert plain < accounted_bits(found, scheme)["stored_bits"] <= plain + budget + 1e-9
    errors = {name: energy(weight - found.dequantized(), statistics.second_moment) for name, found in solved.items()}
    assert max(errors.values()) < energy(weight - bare.dequantized(), statistics.second_moment)


def test_columns_that_gptq_rounds_first_keep_their_precision():
    weight, statistics = weight_of(), statistics_of(inputs())
    found = residual_columns(
        weight, statistics, INT4, rank=4, order="second_moment", base="gptq", activation_order=True
    )
    rest = weight - found.residual.added_to(torch.zeros_like(weight))
    assert torch.equal(found.quantized.codes, gptq(rest, statistics, INT4, activation_order=True).quantized.codes)
    first = statistics.second_moment.diagonal().argmax()
    step = steps_of(found.residual)[..., 0]
    assert ((weight - found.dequantized())[:, first].abs() <= 0.5 * step * (1 + 1e-4) + 1e-6).all()
    bare = gptq(weight, statistics, INT4, activation_order=True)
    assert energy(weight - found.dequantized(), statistics.second_moment) < energy(
        weight - bare.dequantized(), statistics.second_moment
    )
