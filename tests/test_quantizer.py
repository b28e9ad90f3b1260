"""The quantizer against independent oracles (ml_dtypes, plain Python), worked examples, and its invariants."""

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgrid.errors import ConfigError, NumericalFailure
from quantgrid.formats import ELEMENT_FORMATS, SCALE_FORMATS
from quantgrid.quantizer import (
    PRESETS,
    QuantizationParameters,
    QuantScheme,
    activation_scheme,
    codebooks,
    decode,
    encode,
    fake_quantize,
    find_parameters,
    quantize,
    round_values,
    scheme,
    step_size,
    zero_points,
)  # fmt: skip
from quantgrid.scales import STORAGE_DTYPES, load_scale, store_scale

FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
SCHEMES = {
    f"{name} {tensor}": found
    for name in PRESETS
    for tensor, found in (("weight", PRESETS[name]["weight"] and scheme(name)), ("activation", activation_scheme(name)))
    if found is not None
}
VARIANTS = {
    "tensor": scheme("int4", granularity="tensor"),
    "tensor asymmetric": scheme("int4_asym", granularity="tensor"),
    "qmax 7.5": scheme("int4", qmax=7.5, group_size=32),
    "fp16 scales": scheme("int4_asym", group_size=32, scale_format="fp16"),
    "bf16 scales": scheme("fp4", group_size=32, scale_format="bf16"),
    "mse": scheme("int4", range="mse", mse_steps=10),
    "mse asymmetric": scheme("int4_asym", range="mse", mse_steps=10, group_size=32),
    "mse nvfp4": scheme("nvfp4", range="mse", mse_steps=10),
    "mse tensor": scheme("fp4", range="mse", mse_steps=5, granularity="tensor"),
    "percentile": activation_scheme("int4", range="percentile", percentile=90),
    "clip": activation_scheme("int4", clip_ratio=0.9),
    "tensor global": scheme("nvfp4", granularity="tensor"),
    "channel e4m3": scheme("fp4", scale_format="e4m3"),
    "exhaustive mxfp4": scheme("mxfp4", range="exhaustive"),
    "exhaustive nvfp4": scheme("nvfp4", range="exhaustive"),
    "exhaustive token": activation_scheme("nvfp4", range="exhaustive"),
    "exhaustive four_thirds": scheme("mxfp4", range="exhaustive", scale_rule="four_thirds"),
    "kmeans groups": scheme("kmeans2", group_size=32, scale_format="fp16"),
    "kmeans tensor": scheme("kmeans3", granularity="tensor"),
    "kmeans e8m0": scheme("kmeans4", group_size=32, scale_format="e8m0"),
    "unsigned groups": activation_scheme("fp4_ue2m2", group_size=32),
    "unsigned tensor": activation_scheme("fp4_ue3m1", granularity="tensor"),
    "unsigned e4m3": activation_scheme("nvfp4", element="ue2m2"),
    "unsigned e8m0": activation_scheme("mxfp4", element="ue3m1"),
    "unsigned mse": activation_scheme("fp4_ue2m2", range="mse", mse_steps=10),
    "asymmetric e8m0": scheme("int4_asym", group_size=32, scale_format="e8m0"),
    "asymmetric two-level": scheme("int4_asym", group_size=16, scale_format="e4m3"),
    **{f"mxfp4 {rule}": scheme("mxfp4", scale_rule=rule) for rule in ("even", "rceil", "four_thirds")},
    **{f"{name} scales": scheme("nvfp4", scale_format=name) for name in ("e5m2", "e3m2", "e2m3", "e2m1", "int4", "fp16", "e8m0")},
}
EVERY = {**SCHEMES, **VARIANTS}


def unit_step(element, symmetric=True):
    return torch.ones(()), None if symmetric else torch.tensor(0.0), QuantScheme(element, symmetric=symmetric)


def bits_of(x):
    return x.view({torch.float64: torch.int64, torch.float32: torch.int32}.get(x.dtype, torch.int16))


def same_bits(first, second):
    return first.dtype == second.dtype and torch.equal(bits_of(first), bits_of(second))


def heavy_tailed(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp(2 * torch.randn((*shape[:-1], 1), generator=generator, dtype=torch.float64)) + 0.3
    return x.to(dtype)


# ---- elements ----


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_float_code_round_trips(name, dtype):
    step, _, unit = unit_step(name)
    values = torch.tensor(ELEMENT_FORMATS[name].values(), dtype=dtype)
    codes = torch.arange(len(values), dtype=torch.uint8)
    finite = torch.isfinite(values)
    assert torch.equal(encode(values[finite], step, None, unit), codes[finite])
    assert same_bits(decode(codes[finite], step, None, unit, dtype), values[finite])


def nearest_codes(points, name):
    """Brute force: the nearest value, of two the one with the even code (ml_dtypes rounds float64 to float32 first, so it rounds twice)."""
    table = np.array(
        [value if math.isfinite(value) else math.inf for value in ELEMENT_FORMATS[name].values()][: 2 ** (ELEMENT_FORMATS[name].bits - 1)]
    )
    distance = np.abs(np.abs(points.numpy())[:, None] - table)
    magnitude = np.where(distance == distance.min(1, keepdims=True), np.arange(len(table)) % 2, 2).argmin(1)
    return (magnitude + len(table) * np.signbit(points.numpy())).astype(np.uint8)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_ties_neighbours_subnormals_and_saturation_equal_ml_dtypes(name, dtype):
    values = torch.tensor(sorted({value for value in ELEMENT_FORMATS[name].values() if math.isfinite(value)}), dtype=dtype)
    ties = (values[1:] + values[:-1]) / 2
    points = torch.cat(
        [values, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1), torch.linspace(-1, 1, 4001, dtype=dtype) * values[-1]]
    )
    points = torch.cat([points, points * 1e-3, torch.randn(4000, dtype=dtype) * values[-1] / 4]).clamp(values[0], values[-1])
    step, _, unit = unit_step(name)
    codes = nearest_codes(points, name) if dtype == torch.float64 else points.numpy().astype(FLOATS[name]).view(np.uint8)
    np.testing.assert_array_equal(encode(points, step, None, unit).numpy(), codes)
    assert same_bits(round_values(points, step, None, unit), torch.tensor(ELEMENT_FORMATS[name].values(), dtype=dtype)[codes.astype(np.int64)])
    beyond = torch.tensor([1.001, 2, 1e30], dtype=dtype) * values[-1]
    assert round_values(torch.cat([beyond, -beyond]), step, None, unit).tolist() == [float(values[-1])] * 3 + [-float(values[-1])] * 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_half_to_even_and_saturate(bits):
    points = torch.arange(-(2**bits) - 2, 2**bits + 2, 0.25)
    expected = np.clip(np.rint(points.numpy()), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    step, _, unit = unit_step(f"int{bits}")
    codes = encode(points, step, None, unit)
    assert codes.dtype == torch.int8 and np.array_equal(codes.numpy(), expected)
    step, zero_point, unit = unit_step(f"int{bits}", symmetric=False)
    codes = encode(points, step, zero_point + 1, unit)
    assert codes.dtype == torch.uint8 and np.array_equal(codes.numpy(), np.clip(np.rint(points.numpy()) + 1, 0, 2**bits - 1))


def test_nf4_takes_the_nearest_entry():
    table = np.array(ELEMENT_FORMATS["nf4"].values())
    points = torch.linspace(-1.2, 1.2, 999)
    step, _, unit = unit_step("nf4")
    expected = np.abs(points.numpy()[:, None].astype(np.float64) - table).argmin(1)
    assert np.array_equal(encode(points, step, None, unit).numpy(), expected)
    assert np.array_equal(encode(torch.tensor(table), step, None, unit).numpy(), np.arange(16))


# ---- scales ----


@pytest.mark.parametrize("name", SCALE_FORMATS)
def test_every_scale_code_is_kept(name):
    storage = SCALE_FORMATS[name]
    if name == "e8m0":
        loaded = load_scale(torch.arange(256, dtype=torch.int16).to(torch.uint8), storage).tolist()
        assert loaded[:255] == list(storage.values())[:255] and math.isnan(loaded[255])
        return
    values = [2.0**-149, 0.0, 1 / 3, 3e38] if name == "fp32" else [v for v in storage.values() if v >= 0 and math.isfinite(v)]
    values = torch.tensor(values, dtype=torch.float32)
    stored = store_scale(values, storage)
    assert stored.dtype == STORAGE_DTYPES.get(name, torch.uint8)
    assert torch.equal(load_scale(stored, storage), values)


@pytest.mark.parametrize("name", FLOATS)
def test_scales_are_rounded_half_to_even_and_saturate(name):
    storage = SCALE_FORMATS[name]
    values = torch.tensor(sorted({v for v in storage.values() if v >= 0 and math.isfinite(v)}), dtype=torch.float32)
    ties = (values[1:] + values[:-1]) / 2
    points = torch.cat(
        [ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0), torch.rand(4000) * values[-1], torch.rand(4000) * 0.05]
    )
    expected = torch.from_numpy(points.numpy().astype(FLOATS[name]).astype(np.float32))
    assert torch.equal(load_scale(store_scale(points, storage), storage), expected)
    assert load_scale(store_scale(values[-1:] * 3, storage), storage) == values[-1]


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int4", "int8"])
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "four_thirds"])
def test_e8m0_rules_by_their_definitions(element, rule):
    unit = QuantScheme(element, "e8m0", "group", 1, scale_rule=rule)
    peaks = torch.exp2(torch.linspace(-130, 127.9, 3001))
    peaks = torch.cat([peaks, torch.tensor([1.0, 1.5, 1.75, 1.8125, 1.9375, 6.0, 7.0, 448.0, 3.4e38, 2.0**-149])])[:, None]
    exponents = torch.tensor([math.frexp(p)[1] - 1 for p in peaks[:, 0].tolist()])
    mantissas = peaks[:, 0].double() / torch.exp2(exponents.double())
    limit_mantissa, limit_exponent = math.frexp(unit.limit)[0] * 2, math.frexp(unit.limit)[1] - 1
    bits = ELEMENT_FORMATS[element]
    mantissa_bits = bits.bits - 2 if bits.kind == "integer" else bits.mantissa_bits
    bump = {"floor": 0, "four_thirds": 2, "even": mantissas >= 2 - 2.0 ** -(mantissa_bits + 1), "rceil": mantissas > limit_mantissa}[rule]
    expected = (exponents + bump - limit_exponent + 127).clamp(0, 254)
    normal = peaks[:, 0] >= 2.0**-126
    parameters = find_parameters(peaks, unit)
    assert torch.equal(parameters.scale[normal, 0].long(), expected[normal])
    step = step_size(parameters, unit, peaks.shape)
    assert rule not in ("rceil", "four_thirds") or bool((peaks / step <= unit.limit * (1 + 1e-6))[normal].all())


# ---- worked examples ----


def test_int4_example():
    quantized = quantize(torch.tensor([[7, -3.5, 0.49, -0.51]]) * 0.25, scheme("int4"))
    assert quantized.codes.tolist() == [[7, -4, 0, -1]] and quantized.scale.tolist() == [[0.25]]


def test_mxfp4_examples():
    floor = scheme("mxfp4", group_size=5)
    quantized = quantize(torch.tensor([7, -3.5, 0.6, 0.2, 1]), floor)
    assert quantized.scale.tolist() == [[127]]
    assert quantized.dequantize().tolist() == [6, -4, 0.5, 0, 1] and quantized.codes.tolist() == [7, 14, 1, 0, 2]
    quantized = quantize(torch.tensor([1, -0.3, 0.05, 0.9]), scheme("mxfp4", group_size=4))
    assert quantized.scale.tolist() == [[125]] and quantized.codes.tolist() == [6, 10, 0, 6]
    assert quantize(torch.tensor([6.5]), scheme("mxfp4", group_size=1)).dequantize().item() == 6
    quantized = quantize(torch.tensor([6.5]), scheme("mxfp4", group_size=1, scale_rule="rceil"))
    assert quantized.scale.item() == 128 and quantized.dequantize().item() == 6
    for rule in ("even", "rceil"):
        assert quantize(torch.tensor([7.0]), scheme("mxfp4", group_size=1, scale_rule=rule)).dequantize().item() == 8
    four_thirds = quantize(torch.tensor([7.0]), scheme("mxfp4", group_size=1, scale_rule="four_thirds"))
    assert four_thirds.scale.item() == 129 and four_thirds.bits() == 12  # byte: 2**floor(log2 amax); the third is not stored
    assert four_thirds.dequantize().item() == pytest.approx(8)


def test_nvfp4_example():
    x = torch.tensor([[12.0] * 3, [1, 0.5, 0.33]])
    quantized = quantize(x, scheme("nvfp4", group_size=3))
    assert quantized.global_scale.item() == pytest.approx(12 / 2688) and quantized.scale.dtype == torch.float8_e4m3fn
    assert quantized.scale.float().tolist() == [[448], [36]] and quantized.codes[1].tolist() == [7, 5, 4]
    assert quantized.dequantize()[1].tolist() == pytest.approx([0.9643, 0.4821, 0.3214], abs=5e-5)


def test_nvfp4_block_that_underflows_is_zero():
    x = torch.tensor([[1.0] * 16, [-1e-7] * 16])
    quantized = quantize(x, scheme("nvfp4"))
    assert quantized.scale.float()[1].item() == 0 and quantized.codes[1].tolist() == [0] * 16
    assert same_bits(fake_quantize(x, scheme("nvfp4")), quantized.dequantize())
    subnormal = quantize(torch.tensor([[1.0] * 16, [2.0**-9 * 3 / 448] * 16]), scheme("nvfp4"))
    assert subnormal.scale.float()[1].item() == 3 * 2.0**-9


def test_gaussian_error_of_the_e8m0_rules():
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    expected = {"floor": 0.01326, "even": 0.01254, "rceil": 0.01336, "four_thirds": 0.01389}
    for rule, error in expected.items():
        assert (fake_quantize(x, scheme("mxfp4", scale_rule=rule)) - x).square().mean().item() == pytest.approx(error, rel=0.02)
    for qmax, error in ((7, 0.00944), (7.5, 0.00900)):
        assert (fake_quantize(x, scheme("int4", group_size=32, qmax=qmax)) - x).square().mean().item() == pytest.approx(error, rel=0.02)


def test_a_positive_token_keeps_half_a_step_under_asymmetry():
    x = torch.tensor([[5.0, 5.0, 5.0], [-3.0, -3.0, -3.0]])
    quantized = quantize(x, activation_scheme("int4"))
    assert quantized.zero_point.tolist() == [[0], [15]]
    assert ((quantized.dequantize() - x).abs() <= quantized.scale / 2).all()


# ---- invariants over every scheme ----


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(key, dtype):
    for x in (heavy_tailed(2, 5, 192, dtype=dtype), heavy_tailed(64, dtype=dtype), torch.zeros(3, 64, dtype=dtype), -torch.zeros(1, 64, dtype=dtype)):
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
    x = heavy_tailed(2, 3, 4, 96)
    whole = quantize(x, EVERY[key])
    for i in range(2):
        for j in range(3):
            single = quantize(x[i, j], EVERY[key])
            assert torch.equal(whole.codes[i, j], single.codes) and torch.equal(whole.scale[i, j].float(), single.scale.float())
            assert same_bits(fake_quantize(x, EVERY[key])[i, j], single.dequantize())


@pytest.mark.parametrize("key", EVERY)
def test_rows_do_not_depend_on_chunks_or_strides(key, monkeypatch):
    x = heavy_tailed(7, 192)
    expected = quantize(x, EVERY[key])
    strided = heavy_tailed(7, 192).t().contiguous().t()
    assert not strided.is_contiguous() and torch.equal(quantize(strided, EVERY[key]).codes, expected.codes)
    assert same_bits(fake_quantize(strided, EVERY[key]), expected.dequantize())
    if "mse tensor" not in key:
        monkeypatch.setattr("quantgrid.ranges._CACHED_ELEMENTS", 192 * 2)
        assert same_bits(fake_quantize(x, EVERY[key]), expected.dequantize())


@pytest.mark.parametrize("key", EVERY)
def test_zero_empty_and_tiny_tensors(key):
    for shape in ((3, 64), (1, 96), (2, 2, 32)):
        zeros = quantize(torch.zeros(shape), EVERY[key])
        assert same_bits(zeros.dequantize(), torch.zeros(shape)) and torch.isfinite(step_size(zeros.parameters, EVERY[key], shape)).all()
        assert EVERY[key].element == "nf4" or zeros.codes.abs().max() == 0
        assert zeros.codebook is None or zeros.codebook.abs().max() == 0
    for shape in ((0, 64), (4, 0), (2, 0, 64), (0,)):
        empty = torch.zeros(shape)
        quantized = quantize(empty, EVERY[key])
        assert quantized.dequantize().shape == fake_quantize(empty, EVERY[key]).shape == quantized.codes.shape == shape
        assert quantized.scale.shape == EVERY[key].scale_shape(shape) and quantized.bits() == 0
    assert torch.isfinite(fake_quantize(torch.full((2, 96), 1e-44), EVERY[key])).all()
    assert torch.isfinite(fake_quantize(torch.full((2, 96), 1e38), EVERY[key])).all()


@pytest.mark.parametrize("key", EVERY)
def test_idempotent_under_fixed_parameters(key):
    x = heavy_tailed(4, 96)
    quantized = quantize(x, EVERY[key])
    again = quantize(quantized.dequantize(), EVERY[key], quantized.parameters)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("key", EVERY)
def test_columns_rounded_one_by_one_equal_the_whole(key):
    used, x = EVERY[key], heavy_tailed(2, 4, 96)
    parameters = find_parameters(x, used)
    step, zero_point, books = (part(parameters, used, x.shape) for part in (step_size, zero_points, codebooks))
    groups = used.scale_shape(x.shape)[-1]
    assert step.shape == (2, 4, groups) and step.dtype == torch.float32
    expected = quantize(x, used, parameters)
    for column in range(0, 96, 7):
        group = column * groups // 96
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
@given(st.sampled_from(sorted(key for key, used in EVERY.items() if used.symmetric and used.element_format.kind in ("integer", "float"))),
       st.integers(0, 2**31))  # fmt: skip
def test_symmetric(key, seed):
    used, x = EVERY[key], heavy_tailed(2, 96, seed=seed)
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
    used, x = EVERY[key], heavy_tailed(2, 96, seed=seed)
    fixed_range = used.storage.global_scale != "never" and used.global_scale == "none"  # a narrow scale format alone is not scale free
    if not fixed_range:
        assert torch.equal(fake_quantize(x * 2.0**exponent, used), fake_quantize(x, used) * 2.0**exponent)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(EVERY)), st.lists(st.integers(0, 4), min_size=1, max_size=2), st.sampled_from([1, 2, 3]),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.booleans(), st.integers(0, 2**31))  # fmt: skip
def test_any_shape_dtype_and_stride(key, rows, blocks, dtype, strided, seed):
    used = EVERY[key]
    x = heavy_tailed(*rows, 96 * blocks, dtype=dtype, seed=seed)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x
    quantized = quantize(x, used)
    assert same_bits(fake_quantize(x, used), quantized.dequantize()) and quantized.codes.shape == x.shape
    assert torch.equal(quantize(x.contiguous(), used).codes, quantized.codes)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(quantize(quantized.dequantize(), used, quantized.parameters).dequantize(), quantized.dequantize())
    assert torch.isfinite(quantized.dequantize()).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["fp4", "fp8", "mxfp6", "nvfp4", "fp4_ue2m2", "fp4_ue3m1", "nf4"]), st.integers(0, 2**31))
def test_error_is_at_most_half_the_widest_gap(name, seed):
    """Of values within the format's range: the largest distance of neighbouring values, in steps."""
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
    for used in (scheme(name), activation_scheme(name), scheme(name, group_size=32), scheme(name, granularity="tensor")):
        step = step_size(find_parameters(x, used), used, x.shape).repeat_interleave(96 // used.scale_shape(x.shape)[-1], -1)
        slack = 0.5 if used.symmetric else 1.0  # a rounded zero point may move the end of the range by half a step more
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
    assert same_bits(fake_quantize(x, activation_scheme("nvfp4"))[2:3], fake_quantize(x[2:3], activation_scheme("nvfp4")))


@pytest.mark.parametrize("key", ["int4 weight", "int4 activation", "mxfp4 weight", "nvfp4 weight", "nf4 weight", "percentile", "mse", "tensor"])
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
        (lambda: quantize(torch.zeros(2, 100), scheme("mxfp4")), "group_size 32 does not divide the last dimension 100; these do: 2, 4, 5"),
        (lambda: quantize(torch.zeros(2, 4, dtype=torch.int32), scheme("int4")), "dtype torch.int32"),
        (lambda: quantize(torch.zeros(()), scheme("int4")), "a scalar"),
        (lambda: find_parameters(torch.zeros(2, 16), scheme("nvfp4", global_scale="static")), "pass find_parameters"),
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
