"""Invariants of the quantizer over every scheme; global scales and refusals."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.quantizer import QuantizationParameters, fake_quantize, find_parameters, quantize
from quantgrid.quantizer.rounding import decode, encode, round_values
from quantgrid.quantizer.tensors import codebooks, step_size, zero_points
from quantgrid.schemes import QuantScheme, activation_scheme, scheme
from quantizer_cases import EVERY, heavy_tailed, same_bits, width

# ---- invariants over every scheme ----


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(key, dtype):
    for x in (
        heavy_tailed(2, 5, width(EVERY[key], 192), dtype=dtype),
        heavy_tailed(width(EVERY[key], 64), dtype=dtype),
        torch.zeros(3, width(EVERY[key], 64), dtype=dtype),
        -torch.zeros(1, width(EVERY[key], 64), dtype=dtype),
    ):
        quantized = quantize(x, EVERY[key])
        expected = quantized.dequantize()
        assert expected.dtype == dtype and quantized.codes.shape == x.shape
        assert same_bits(fake_quantize(x, EVERY[key]), expected)
        assert same_bits(fake_quantize(x, EVERY[key], quantized.parameters), expected)
        assert quantized.scale.shape == EVERY[key].scale_shape(x.shape)
        assert quantized.bits() == pytest.approx(EVERY[key].bits_per_element(x.shape), rel=1e-12)
        low, high = EVERY[key].code_range
        assert low <= int(quantized.codes.min()) and int(quantized.codes.max()) <= high


@pytest.mark.parametrize("key", EVERY)
def test_a_batch_is_its_matrices(key):
    x = heavy_tailed(2, 3, 4, width(EVERY[key], 96))
    whole = quantize(x, EVERY[key])
    for i in range(2):
        for j in range(3):
            single = quantize(x[i, j], EVERY[key])
            assert torch.equal(whole.codes[i, j], single.codes) and torch.equal(
                whole.scale[i, j].float(), single.scale.float()
            )
            assert same_bits(fake_quantize(x, EVERY[key])[i, j], single.dequantize())


@pytest.mark.parametrize("key", EVERY)
def test_rows_do_not_depend_on_chunks_or_strides(key, monkeypatch):
    n = width(EVERY[key], 192)
    x = heavy_tailed(7, n)
    expected = quantize(x, EVERY[key])
    strided = heavy_tailed(7, n).t().contiguous().t()
    assert not strided.is_contiguous() and torch.equal(quantize(strided, EVERY[key]).codes, expected.codes)
    assert same_bits(fake_quantize(strided, EVERY[key]), expected.dequantize())
    if "mse tensor" not in key:
        monkeypatch.setattr("quantgrid.quantizer.ranges._CACHED_ELEMENTS", n * 2)
        assert same_bits(fake_quantize(x, EVERY[key]), expected.dequantize())


@pytest.mark.parametrize("key", EVERY)
def test_zero_empty_and_tiny_tensors(key):
    for shape in ((3, width(EVERY[key], 64)), (1, width(EVERY[key], 96)), (2, 2, width(EVERY[key], 32))):
        zeros = quantize(torch.zeros(shape), EVERY[key])
        assert (
            same_bits(zeros.dequantize(), torch.zeros(shape))
            and torch.isfinite(step_size(zeros.parameters, EVERY[key], shape)).all()
        )
        assert EVERY[key].element == "nf4" or zeros.codes.abs().max() == 0
        assert zeros.codebook is None or zeros.codebook.abs().max() == 0
    for shape in ((0, width(EVERY[key], 64)), (4, 0), (2, 0, width(EVERY[key], 64)), (0,)):
        empty = torch.zeros(shape)
        quantized = quantize(empty, EVERY[key])
        assert quantized.dequantize().shape == fake_quantize(empty, EVERY[key]).shape == quantized.codes.shape == shape
        assert quantized.scale.shape == EVERY[key].scale_shape(shape) and quantized.bits() == 0
    for value in (1e-44, 1e38):
        assert torch.isfinite(fake_quantize(torch.full((2, width(EVERY[key], 96)), value), EVERY[key])).all()


@pytest.mark.parametrize("key", EVERY)
def test_idempotent_under_fixed_parameters(key):
    x = heavy_tailed(4, width(EVERY[key], 96))
    quantized = quantize(x, EVERY[key])
    again = quantize(quantized.dequantize(), EVERY[key], quantized.parameters)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("key", EVERY)
def test_columns_rounded_one_by_one_equal_the_whole(key):
    used, n = EVERY[key], width(EVERY[key], 96)
    x = heavy_tailed(2, 4, n)
    parameters = find_parameters(x, used)
    step, zero_point, books = (part(parameters, used, x.shape) for part in (step_size, zero_points, codebooks))
    groups = used.scale_shape(x.shape)[-1]
    assert step.shape == (2, 4, groups) and step.dtype == torch.float32
    expected = quantize(x, used, parameters)
    for column in range(0, n, 7):
        group = column * groups // n
        offset = None if zero_point is None else zero_point[..., group]
        offset = None if offset is None else offset.unsqueeze(-1)
        of_column = None if books is None else books[..., group, :]
        codes = encode(x[..., column, None], step[..., group, None], offset, used, of_column)
        values = decode(codes, step[..., group, None], offset, used, codebook=of_column)
        assert torch.equal(codes[..., 0], expected.codes[..., column])
        assert same_bits(values[..., 0].contiguous(), expected.dequantize()[..., column].contiguous())
        assert same_bits(round_values(x[..., column, None], step[..., group, None], offset, used, of_column), values)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(EVERY)), st.integers(0, 2**31))
def test_monotone_under_fixed_parameters(key, seed):
    x = heavy_tailed(2, 96, seed=seed)
    parameters = find_parameters(x, QuantScheme(EVERY[key].element, symmetric=EVERY[key].symmetric))
    one = QuantScheme(EVERY[key].element, symmetric=EVERY[key].symmetric)
    ordered = x.sort(dim=-1).values
    assert (fake_quantize(ordered, one, parameters).diff(dim=-1) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        sorted(
            key for key, used in EVERY.items() if used.symmetric and used.element_format.kind in ("integer", "float")
        )
    ),
    st.integers(0, 2**31),
)
def test_symmetric(key, seed):
    used, x = EVERY[key], heavy_tailed(2, width(EVERY[key], 96), seed=seed)
    parameters = find_parameters(x, used)
    if used.range != "mse":  # the search sees the lowest code, which has no counterpart
        assert torch.equal(find_parameters(-x, used).scale.float(), parameters.scale.float())
    positive, negative = quantize(x, used, parameters), quantize(-x, used, parameters)
    inside = torch.ones_like(x, dtype=torch.bool)
    if used.element_format.kind == "integer":  # the lowest code has no counterpart
        inside = torch.minimum(positive.codes, negative.codes) > used.code_range[0]
    assert torch.equal(positive.dequantize()[inside], -negative.dequantize()[inside])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(EVERY)), st.integers(-20, 20), st.integers(0, 2**31))
def test_equivariant_under_powers_of_two(key, exponent, seed):
    used, x = EVERY[key], heavy_tailed(2, width(EVERY[key], 96), seed=seed)
    fixed_range = (
        used.storage.global_scale != "never" and used.global_scale == "none"
    )  # a narrow scale format alone is not scale free
    if not fixed_range:
        assert torch.equal(fake_quantize(x * 2.0**exponent, used), fake_quantize(x, used) * 2.0**exponent)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(EVERY)),
    st.lists(st.integers(0, 4), min_size=1, max_size=2),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape_dtype_and_stride(key, rows, blocks, dtype, strided, seed):
    used = EVERY[key]
    x = heavy_tailed(*rows, width(used, 96) * blocks, dtype=dtype, seed=seed)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x
    quantized = quantize(x, used)
    assert same_bits(fake_quantize(x, used), quantized.dequantize()) and quantized.codes.shape == x.shape
    assert torch.equal(quantize(x.contiguous(), used).codes, quantized.codes)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(
            quantize(quantized.dequantize(), used, quantized.parameters).dequantize(), quantized.dequantize()
        )
    assert torch.isfinite(quantized.dequantize()).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["fp4", "fp8", "mxfp6", "nvfp4", "fp4_ue2m2", "fp4_ue3m1", "nf4"]), st.integers(0, 2**31))
def test_error_is_at_most_half_the_widest_gap(name, seed):
    """Largest distance of neighbouring values within the format's range, in steps."""
    used = activation_scheme(name) or scheme(name)
    x = heavy_tailed(4, 96, seed=seed)
    found = find_parameters(x, used)
    step = step_size(found, used, x.shape).repeat_interleave(96 // used.scale_shape(x.shape)[-1], -1)
    offset = zero_points(found, used, x.shape)
    values = sorted({value for value in used.element_format.values() if math.isfinite(value)})
    low, high = (step * end + (0 if offset is None else offset) for end in (values[0], values[-1]))
    inside = (x >= low) & (x <= high)
    gap = max(after - before for before, after in pairwise(values))
    assert ((fake_quantize(x, used) - x).abs() <= step * gap / 2 * (1 + 1e-5) + 1e-30)[inside].all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int2", "int3", "int4", "int8", "int4_asym"]), st.integers(0, 2**31))
def test_error_is_at_most_half_a_step(name, seed):
    x = heavy_tailed(4, 96, seed=seed)
    for used in (
        scheme(name),
        activation_scheme(name),
        scheme(name, group_size=32),
        scheme(name, granularity="tensor"),
    ):
        step = step_size(find_parameters(x, used), used, x.shape).repeat_interleave(
            96 // used.scale_shape(x.shape)[-1], -1
        )
        # a rounded zero point may move the end of the range by half a step more
        slack = 0.5 if used.symmetric else 1.0
        assert ((fake_quantize(x, used) - x).abs() <= step * (slack + 1e-4)).all()


# ---- global scales and refusals ----


def test_a_given_global_scale_is_shared():
    x = heavy_tailed(2, 4, 32)
    shared = find_parameters(x.reshape(8, 32), scheme("nvfp4")).global_scale
    separate = [find_parameters(matrix, scheme("nvfp4", global_scale="static"), shared) for matrix in x]
    together = find_parameters(x.reshape(8, 32), scheme("nvfp4"))
    assert torch.equal(torch.cat([p.scale.float() for p in separate]), together.scale.float())
    quantized = quantize(x, scheme("nvfp4"), find_parameters(x, scheme("nvfp4"), 0.25))
    assert quantized.global_scale.item() == 0.25


def test_token_global_scales_do_not_depend_on_other_rows():
    x = heavy_tailed(6, 64)
    assert same_bits(
        fake_quantize(x, activation_scheme("nvfp4"))[2:3], fake_quantize(x[2:3], activation_scheme("nvfp4"))
    )


@pytest.mark.parametrize(
    "key",
    ["int4 weight", "int4 activation", "mxfp4 weight", "nvfp4 weight", "nf4 weight", "percentile", "mse", "tensor"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 17, 63])
def test_nan_and_infinity_are_named(key, bad, position):
    x = torch.randn(3, 64)
    parameters = find_parameters(x, EVERY[key])
    x[1, position] = bad
    for call in (quantize, fake_quantize, find_parameters):
        with pytest.raises(NumericalFailure, match="1 NaN" if math.isnan(bad) else "1 infinite"):
            call(x, EVERY[key])
    for call in (quantize, fake_quantize):
        with pytest.raises(NumericalFailure):
            call(x, EVERY[key], parameters)
    fake_quantize(x, EVERY[key], parameters, check=False)


def test_a_range_beyond_float32_is_named():
    with pytest.raises(NumericalFailure, match="exceeds float32"):
        quantize(torch.tensor([[1e300]], dtype=torch.float64), scheme("int4"))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: quantize(torch.zeros(2, 100), scheme("mxfp4")),
            "group_size 32 does not divide the last dimension 100; accepted: 2, 4, 5",
        ),
        (lambda: quantize(torch.zeros(2, 4, dtype=torch.int32), scheme("int4")), "dtype torch.int32"),
        (lambda: quantize(torch.zeros(()), scheme("int4")), "a scalar"),
        (lambda: find_parameters(torch.zeros(2, 16), scheme("nvfp4", global_scale="static")), "pass find_parameters"),
        (lambda: find_parameters(torch.zeros(2, 16), scheme("nvfp4", global_scale="site")), "pass find_parameters"),
        (lambda: find_parameters(torch.zeros(2, 16), scheme("int4"), 0.5), "global_scale 'none'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_parameters_from_outside():
    parameters = QuantizationParameters(torch.tensor([[0.5], [0.25]]))
    assert quantize(torch.ones(2, 3), scheme("int4"), parameters).codes.tolist() == [[2] * 3, [4] * 3]
    assert fake_quantize(torch.ones(2, 3, requires_grad=True), scheme("int4"), parameters).requires_grad is False
