"""Packing is exact for every width, and as small as it claims."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgrid.errors import ConfigError
from quantgrid.packing import pack, packed_length, unpack
from quantgrid.quantizer import PRESETS, quantize, scheme


def test_low_nibble_comes_first():
    assert pack(torch.tensor([1, 2, 15, 7, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x7F, 0x03]
    assert pack(torch.tensor([-1, 1, -8], dtype=torch.int8), 4).tolist() == [0x1F, 0x08]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_at_every_position(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.arange(low, high, dtype=torch.int16).to(torch.int8 if signed else torch.uint8)
    codes = torch.stack([codes.roll(shift) for shift in range(9)])
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, codes.shape, signed), codes)
    assert packed.numel() == codes.numel() * bits / 8


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_follow_one_another(bits):
    codes = torch.randint(0, 2**bits, (37,), dtype=torch.uint8)
    whole = sum(int(code) << (bits * position) for position, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == whole.to_bytes(packed_length(37, bits), "little")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.booleans(), st.integers(0, 2**31))
def test_round_trip_of_any_shape(bits, shape, signed, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, shape, generator=generator).to(torch.int8 if signed else torch.uint8)
    codes = codes.transpose(0, -1)
    packed = pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], math.ceil(codes.shape[-1] * bits / 8))
    assert torch.equal(unpack(packed, bits, codes.shape, signed), codes)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name]["weight"] is not None])
def test_accounting_equals_packed_bytes(name):
    quantized = quantize(torch.randn(64, 192), scheme(name))
    element, storage = quantized.scheme.element_format, quantized.scheme.storage
    tensors = [pack(quantized.codes, element.bits)]
    tensors.append(quantized.scale if storage.bits >= 8 else pack(quantized.scale, storage.bits))
    tensors += [] if quantized.zero_point is None else [pack(quantized.zero_point.flatten(), element.bits)]
    tensors += [] if quantized.global_scale is None else [quantized.global_scale]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert quantized.bits() == quantized.scheme.bits_per_element((64, 192)) == stored * 8 / quantized.codes.numel()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pack(torch.zeros(4, dtype=torch.uint8), 9), "2 to 8"),
        (lambda: pack(torch.zeros(4), 4), "int8 and uint8"),
        (lambda: pack(torch.tensor([16], dtype=torch.uint8), 4), "4 bits hold 0 to 15"),
        (lambda: pack(torch.tensor([-9], dtype=torch.int8), 4), "4 bits hold -8 to 7"),
        (lambda: unpack(torch.zeros(3, dtype=torch.uint8), 4, (4,), False), r"of shape \(2,\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
