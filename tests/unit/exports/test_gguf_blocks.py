"""Blocks of GGML types: the values that the gguf package reads from them, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from quantgrid.exports.gguf_blocks import bfloat16_bytes, blocks_of
from quantgrid.exports.gguf_capabilities import BLOCKS
from quantgrid.ground.errors import ConfigError
from quantgrid.quantizer.tensors import quantize
from quantgrid.schemes.quant_scheme import QuantScheme

MX = {"element": "e2m1", "scale_format": "e8m0", "scale_rule": "floor"}
NV = {"element": "e2m1", "scale_format": "e4m3", "global_scale": "tensor"}
EXACT = [
    *(("Q4_0", {"element": f"int{bits}"}) for bits in (2, 3, 4)),
    ("Q5_0", {"element": "int5"}),
    *(("Q8_0", {"element": f"int{bits}"}) for bits in (6, 7, 8)),
    ("MXFP4", MX),
]
GRANULAR = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    *({"granularity": "group", "group_size": n} for n in (32, 64)),
]


def weight(rows: int = 6, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05


def read_back(made) -> torch.Tensor:
    return torch.from_numpy(dequantize(made.data, GGMLQuantizationType[made.name]))


@pytest.mark.parametrize("granular", GRANULAR, ids=str)
@pytest.mark.parametrize("name, fields", EXACT, ids=lambda value: value if isinstance(value, str) else value["element"])
def test_the_values_of_symmetric_blocks_are_those_of_the_codes(name: str, fields: dict, granular: dict):
    scales = {} if "scale_format" in fields else {"scale_format": "fp16"}
    quantized = quantize(weight(), QuantScheme(**fields, **scales, **granular))
    made = blocks_of(quantized, "test")
    assert made.name == name
    assert torch.equal(read_back(made), quantized.dequantize())


@pytest.mark.parametrize("granular", [{"granularity": "channel"}, {"granularity": "group", "group_size": 16}], ids=str)
def test_nvfp4_has_its_global_scale_apart(granular: dict):
    quantized = quantize(weight(), QuantScheme(**NV, **granular))
    made = blocks_of(quantized, "test")
    assert made.name == "NVFP4" and made.scale.shape == (1,)
    wanted = quantized.dequantize()
    assert ((read_back(made) * made.scale[0] - wanted).abs() <= 2e-7 * wanted.abs()).all()


@pytest.mark.parametrize("name, element", [("Q4_1", "int2"), ("Q4_1", "int3"), ("Q4_1", "int4"), ("Q5_1", "int5")])
def test_asymmetric_values_stay_within_their_bound(name: str, element: str):
    """The minimum alone is rounded: at most 2^-11 of (2^bits - 1) steps. Zero points 1 and 2 are
    exact."""
    quantized = quantize(weight() + 0.02, QuantScheme(element, "fp16", "group", 32, symmetric=False))
    made = blocks_of(quantized, "test")
    assert made.name == name
    steps = quantized.scale.float().repeat_interleave(32, -1)
    errors = (read_back(made) - quantized.dequantize()).abs()
    assert (errors.max() > 0) == (element != "int2")
    assert (errors <= steps * (2 ** int(element[-1]) - 1) * 2**-11 + 1e-9).all()


@pytest.mark.parametrize("scale_format", ["fp32", "bf16", "e8m0"])
def test_scales_of_other_formats_stay_within_their_bound(scale_format: str):
    rule = {"scale_rule": "floor"} if scale_format == "e8m0" else {}
    quantized = quantize(weight(), QuantScheme("int4", scale_format, "group", 32, **rule))
    wanted = quantized.dequantize()
    errors = (read_back(blocks_of(quantized, "test")) - wanted).abs()
    assert (errors <= wanted.abs() * 2**-11).all()
    assert (errors.max() == 0) == (scale_format != "fp32")


def test_bfloat16_goes_over_as_it_is():
    values = weight().to(torch.bfloat16)
    read = dequantize(bfloat16_bytes(values.float()), GGMLQuantizationType.BF16)
    assert torch.equal(torch.from_numpy(read), values.float())


def test_sizes_are_those_of_the_gguf_package():
    from gguf import GGML_QUANT_SIZES

    assert {name: block.size for name, block in BLOCKS.items()} == {
        name: GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] for name in BLOCKS
    }


@pytest.mark.parametrize(
    "values, scheme, part",
    [
        (weight(2, 48), QuantScheme("int4", "fp16"), "rows of 48 elements; Q4_0 accepts multiples of 32"),
        (weight(2, 96), QuantScheme(**NV, granularity="group", group_size=16), "NVFP4 accepts multiples of 64"),
        (weight() * 1e8, QuantScheme("int4"), "float16 holds up to 65504"),
        (weight(), QuantScheme("int4", "fp16", "group", 16), "multiples of 32"),
        (weight(), QuantScheme("nf4"), "no GGML type holds nf4 weights"),
        (weight(), QuantScheme("int8", symmetric=False), "no GGML type holds asymmetric int8 weights"),
    ],
    ids=["row", "nvfp4-row", "step", "group", "nf4", "int8-asymmetric"],
)
def test_what_no_block_holds_is_refused(values: torch.Tensor, scheme: QuantScheme, part: str):
    with pytest.raises(ConfigError, match=part):
        blocks_of(quantize(values, scheme), "a linear")
