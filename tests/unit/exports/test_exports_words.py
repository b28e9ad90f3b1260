"""Packed words against a naive reader of bits, and against compressed-tensors' own unpacking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantgrid.exports.awq import awq_tensors
from quantgrid.exports.compressed_tensors import weight_tensors
from quantgrid.exports.gptq import V1, V2, gptq_tensors
from quantgrid.exports.words import awq_words, words, words_down
from quantgrid.quantizer.tensors import quantize
from quantgrid.schemes.named import scheme


def read_bits(packed: Tensor, bits: int, count: int) -> list[int]:
    """Codes of one row of int32 words, from a string of all its bits, lowest first."""
    text = "".join(f"{int(word) & 0xFFFFFFFF:032b}"[::-1] for word in packed)
    return [int(text[start : start + bits][::-1], 2) for start in range(0, count * bits, bits)]


def some(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_codes_low_bits_first_across_words(bits):
    codes = torch.randint(0, 2**bits, (3, 37), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = words(codes, bits)
    assert packed.shape == (3, -(-37 * bits // 32))
    assert [read_bits(row, bits, 37) for row in packed] == codes.tolist()
    assert torch.equal(words_down(codes.T.contiguous(), bits), packed.T)


def test_words_of_one_row_or_one_column():
    column = torch.arange(8, dtype=torch.uint8)[:, None]
    assert words_down(column, 8).shape == (2, 1) and words(column.T, 8).tolist() == [[0x03020100, 0x07060504]]


def test_awq_puts_outputs_in_its_order():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16) % 16
    assert read_bits(awq_words(codes)[0], 4, 16) == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_reads_the_codes_and_zero_points(bits, symmetric):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    wanted = scheme(f"int{bits}", granularity="group", group_size=24, symmetric=symmetric)
    found = quantize(some(20, 72), wanted)
    parts = weight_tensors(found, "pack-quantized", torch.float32)
    codes = unpack_from_int32(parts["weight_packed"], bits, torch.Size([20, 72]))
    zeros = torch.zeros(20, 3)
    if not symmetric:
        zeros = unpack_from_int32(parts["weight_zero_point"], bits, torch.Size([20, 3]), packed_dim=0).float()
    steps = parts["weight_scale"].repeat_interleave(24, 1)
    assert torch.equal((codes.float() - zeros.repeat_interleave(24, 1)) * steps, found.dequantize())
    assert parts["weight_shape"].tolist() == [20, 72]


def test_unpacked_integers_are_signed():
    found = quantize(some(8, 32), scheme("int4_asym"))
    parts = weight_tensors(found, "int-quantized", torch.float32)
    assert parts["weight"].dtype == parts["weight_zero_point"].dtype == torch.int8
    values = (parts["weight"].float() - parts["weight_zero_point"].float()) * parts["weight_scale"]
    assert torch.equal(values, found.dequantize())


def gptq_values(parts: dict[str, Tensor], bits: int, offset: int) -> Tensor:
    """(m, n) of GPTQ's tensors, by their definition, input by input."""
    n, m = len(parts["g_idx"]), parts["scales"].shape[1]
    codes = torch.tensor([read_bits(column, bits, n) for column in parts["qweight"].T])
    zeros = torch.tensor([read_bits(row, bits, m) for row in parts["qzeros"]]) + offset
    groups = parts["g_idx"].long()
    return (codes - zeros[groups].T) * parts["scales"].double()[groups].T


@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("preset,bits", [("int4", 4), ("int8", 8), ("int2", 2)])
def test_gptq_words_are_the_weights(preset, bits, version):
    wanted = scheme(preset, granularity="group", group_size=32, scale_format="fp16")
    found = quantize(some(32, 96), wanted)
    parts = gptq_tensors(found, version)
    assert torch.equal(gptq_values(parts, bits, version == V1).float(), found.dequantize())


def test_a_zero_point_of_zero_needs_the_second_version():
    wanted = scheme("int4_asym", granularity="group", group_size=32, scale_format="fp16")
    found = quantize(some(8, 32).abs(), wanted)
    assert (found.zero_point == 0).any()
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq_tensors(found, V1)
    assert torch.equal(gptq_values(gptq_tensors(found, V2), 4, 0).float(), found.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_words_are_the_weights(symmetric):
    wanted = scheme("int4", granularity="group", group_size=32, scale_format="fp16", symmetric=symmetric)
    found = quantize(some(16, 64), wanted)
    parts = awq_tensors(found)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble that holds output i
    codes, zeros = (
        torch.tensor([read_bits(row, 4, 16) for row in parts[name]]).unflatten(1, (2, 8))[..., order].flatten(1)
        for name in ("qweight", "qzeros")
    )
    groups = torch.arange(64) // 32
    values = (codes - zeros[groups]) * parts["scales"].double()[groups]
    assert torch.equal(values.T.float(), found.dequantize())


@pytest.mark.parametrize("preset,name", [("mxfp4", "mxfp4-pack-quantized"), ("nvfp4", "nvfp4-pack-quantized")])
def test_four_bit_floats_read_from_nibbles(preset, name):
    found = quantize(some(4, 64), scheme(preset))
    parts = weight_tensors(found, name, torch.bfloat16)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = parts["weight_packed"].long()
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    if preset == "mxfp4":
        steps = torch.exp2(parts["weight_scale"].float() - 127).repeat_interleave(32, 1)
    else:
        steps = parts["weight_scale"].float().repeat_interleave(16, 1) / parts["weight_global_scale"]
    assert torch.allclose(table[codes] * steps, found.dequantize(), rtol=3e-7, atol=0)
