"""Elements and scales against independent oracles (ml_dtypes, plain Python), and worked examples."""

import math

import numpy as np
import pytest
import torch

from quantgrid.quantizer import fake_quantize, find_parameters, quantize
from quantgrid.quantizer.rounding import decode, encode, round_values
from quantgrid.quantizer.scales import STORAGE_DTYPES, load_scale, store_scale
from quantgrid.quantizer.tensors import step_size
from quantgrid.schemes import QuantScheme, activation_scheme, scheme
from quantgrid.schemes.number_formats import ELEMENT_FORMATS, SCALE_FORMATS
from quantizer_cases import FLOATS, same_bits, unit_step

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
    """Brute force: the nearest value, of two the one with the even code (ml_dtypes rounds float64
    to float32 first, so it rounds twice)."""
    table = np.array(
        [value if math.isfinite(value) else math.inf for value in ELEMENT_FORMATS[name].values()][
            : 2 ** (ELEMENT_FORMATS[name].bits - 1)
        ]
    )
    distance = np.abs(np.abs(points.numpy())[:, None] - table)
    magnitude = np.where(distance == distance.min(1, keepdims=True), np.arange(len(table)) % 2, 2).argmin(1)
    return (magnitude + len(table) * np.signbit(points.numpy())).astype(np.uint8)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_ties_neighbours_subnormals_and_saturation_equal_ml_dtypes(name, dtype):
    values = torch.tensor(
        sorted({value for value in ELEMENT_FORMATS[name].values() if math.isfinite(value)}), dtype=dtype
    )
    ties = (values[1:] + values[:-1]) / 2
    points = torch.cat(
        [
            values,
            ties,
            torch.nextafter(ties, ties + 1),
            torch.nextafter(ties, ties - 1),
            torch.linspace(-1, 1, 4001, dtype=dtype) * values[-1],
        ]
    )
    points = torch.cat([points, points * 1e-3, torch.randn(4000, dtype=dtype) * values[-1] / 4]).clamp(
        values[0], values[-1]
    )
    step, _, unit = unit_step(name)
    codes = (
        nearest_codes(points, name) if dtype == torch.float64 else points.numpy().astype(FLOATS[name]).view(np.uint8)
    )
    np.testing.assert_array_equal(encode(points, step, None, unit).numpy(), codes)
    assert same_bits(
        round_values(points, step, None, unit),
        torch.tensor(ELEMENT_FORMATS[name].values(), dtype=dtype)[codes.astype(np.int64)],
    )
    beyond = torch.tensor([1.001, 2, 1e30], dtype=dtype) * values[-1]
    assert (
        round_values(torch.cat([beyond, -beyond]), step, None, unit).tolist()
        == [float(values[-1])] * 3 + [-float(values[-1])] * 3
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_half_to_even_and_saturate(bits):
    points = torch.arange(-(2**bits) - 2, 2**bits + 2, 0.25)
    expected = np.clip(np.rint(points.numpy()), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    step, _, unit = unit_step(f"int{bits}")
    codes = encode(points, step, None, unit)
    assert codes.dtype == torch.int8 and np.array_equal(codes.numpy(), expected)
    step, zero_point, unit = unit_step(f"int{bits}", symmetric=False)
    codes = encode(points, step, zero_point + 1, unit)
    assert codes.dtype == torch.uint8 and np.array_equal(
        codes.numpy(), np.clip(np.rint(points.numpy()) + 1, 0, 2**bits - 1)
    )


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
    values = (
        [2.0**-149, 0.0, 1 / 3, 3e38]
        if name == "fp32"
        else [v for v in storage.values() if v >= 0 and math.isfinite(v)]
    )
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
        [
            ties,
            torch.nextafter(ties, ties * 2),
            torch.nextafter(ties, ties * 0),
            torch.rand(4000) * values[-1],
            torch.rand(4000) * 0.05,
        ]
    )
    expected = torch.from_numpy(points.numpy().astype(FLOATS[name]).astype(np.float32))
    assert torch.equal(load_scale(store_scale(points, storage), storage), expected)
    assert load_scale(store_scale(values[-1:] * 3, storage), storage) == values[-1]


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int4", "int8"])
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "four_thirds"])
def test_e8m0_rules_by_their_definitions(element, rule):
    unit = QuantScheme(element, "e8m0", "group", 1, scale_rule=rule)
    peaks = torch.exp2(torch.linspace(-130, 127.9, 3001))
    peaks = torch.cat([peaks, torch.tensor([1.0, 1.5, 1.75, 1.8125, 1.9375, 6.0, 7.0, 448.0, 3.4e38, 2.0**-149])])[
        :, None
    ]
    exponents = torch.tensor([math.frexp(p)[1] - 1 for p in peaks[:, 0].tolist()])
    mantissas = peaks[:, 0].double() / torch.exp2(exponents.double())
    limit_mantissa, limit_exponent = math.frexp(unit.limit)[0] * 2, math.frexp(unit.limit)[1] - 1
    bits = ELEMENT_FORMATS[element]
    mantissa_bits = bits.bits - 2 if bits.kind == "integer" else bits.mantissa_bits
    bump = {
        "floor": 0,
        "four_thirds": 2,
        "even": mantissas >= 2 - 2.0 ** -(mantissa_bits + 1),
        "rceil": mantissas > limit_mantissa,
    }[rule]
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
    assert (
        four_thirds.scale.item() == 129 and four_thirds.bits() == 12
    )  # byte: 2**floor(log2 amax); the third is not stored
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
        assert (fake_quantize(x, scheme("mxfp4", scale_rule=rule)) - x).square().mean().item() == pytest.approx(
            error, rel=0.02
        )
    for qmax, error in ((7, 0.00944), (7.5, 0.00900)):
        assert (fake_quantize(x, scheme("int4", group_size=32, qmax=qmax)) - x).square().mean().item() == pytest.approx(
            error, rel=0.02
        )


def test_a_positive_token_keeps_half_a_step_under_asymmetry():
    x = torch.tensor([[5.0, 5.0, 5.0], [-3.0, -3.0, -3.0]])
    quantized = quantize(x, activation_scheme("int4"))
    assert quantized.zero_point.tolist() == [[0], [15]]
    assert ((quantized.dequantize() - x).abs() <= quantized.scale / 2).all()
