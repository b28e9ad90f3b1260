"""Packing is exact for every width, and as small as it claims."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantgrid.ground.errors import ConfigError
from quantgrid.quantizer import pack, quantize, unpack
from quantgrid.quantizer.packing import packed_length
from quantgrid.schemes import PRESETS, activation_scheme, scheme
from quantizer_cases import computed


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


SCHEMES = {
    f"{name} {tensor}": computed(find(name))
    for name in PRESETS
    for tensor, find in (("weight", scheme), ("activation", activation_scheme))
    if PRESETS[name][tensor] is not None
}
NARROW = {
    f"{name} scales": scheme("nvfp4", scale_format=name) for name in ("e5m2", "e3m2", "e2m3", "e2m1", "int4", "fp16")
}


@pytest.mark.parametrize("name", [*SCHEMES, *NARROW])
def test_accounting_equals_the_bytes_of_a_file(name, tmp_path):
    used = {**SCHEMES, **NARROW}[name]
    quantized = quantize(torch.randn(64, 512), used)
    packed = {"codes": pack(quantized.codes, used.element_format.bits)}
    for part, bits in (
        ("scale", used.storage.bits),
        ("zero_point", used.zero_point_bits),
        ("global_scale", 32),
        ("codebook", 16),
    ):
        tensor = getattr(quantized, part)
        if tensor is not None:
            packed[part] = pack(tensor.flatten(), bits) if bits < 8 else tensor
    save_file(packed, tmp_path / "packed.safetensors")
    content = (tmp_path / "packed.safetensors").read_bytes()
    # less the header and its length
    stored = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert quantized.bits() == used.bits_per_element((64, 512)) == stored * 8 / quantized.codes.numel()


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
