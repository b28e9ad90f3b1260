"""Whole tensors against compressed-tensors and torchao: bitwise agreement, differences, and the
convention used here.

Ours in short: arithmetic is float32 whatever the tensor's dtype; x/step is a true division; scales
are stored first and then used; a block scale that rounds to zero makes a zero block.
"""

import pytest
import torch

from quantgrid.quantizer import QuantizationParameters, quantize
from quantgrid.schemes import activation_scheme, scheme


def values(dtype=torch.float32, seed=0):
    """(64, 512): Gaussian, rows of very different size, outliers, zero blocks, ties and powers of
    two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 512, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    x[::7, ::50] *= 20
    x[3, :64], x[4] = 0.0, torch.randint(-12, 13, (512,), generator=generator) / 4
    x[6] = 0.0
    x[5] = torch.exp2(torch.randint(-6, 6, (512,), generator=generator).float())
    return x.to(dtype)


# ---- torchao ----


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip(
        "torchao.prototype.mx_formats", reason="torchao is not installed (envs/requirements-dev.txt)"
    )


def torchao_mx(torchao, x, mode, element=torch.float4_e2m1fn_x2):
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    scale, data = to_mx(x, element, 32, getattr(torchao.ScaleCalculationMode, mode))
    return scale.view(torch.uint8), data, to_dtype(data, scale, element, 32, torch.float32)


@pytest.mark.parametrize("rule, mode", [("floor", "FLOOR"), ("even", "EVEN"), ("rceil", "RCEIL")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_equals_torchao(torchao, rule, mode, dtype):
    """Codes, scale bytes (0 for a zero block) and values are the same. torchao's default is
    ``floor``, as ours is (OCP MX v1.0)."""
    x = values(dtype)
    ours = quantize(x, scheme("mxfp4", scale_rule=rule))
    scale, packed, dequantized = torchao_mx(torchao, x, mode)
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.codes, torch.stack([packed & 15, packed >> 4], -1).flatten(-2))
    assert torch.equal(ours.dequantize(torch.float32), dequantized)


@pytest.mark.parametrize("element, of_torchao", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2),
                                                 ("e2m3", "fp6_e2m3"), ("e3m2", "fp6_e3m2")])  # fmt: skip
def test_wider_mx_formats_equal_torchao(torchao, element, of_torchao):
    x = values()
    ours = quantize(x, scheme("mxfp8", element=element))
    scale, data, dequantized = torchao_mx(torchao, x, "FLOOR", of_torchao)
    assert torch.equal(ours.scale, scale) and torch.equal(ours.codes, data.view(torch.uint8))
    assert torch.equal(ours.dequantize(torch.float32), dequantized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_torchao_but_for_small_blocks(torchao, dtype):
    """torchao raises every block scale to 2**-6, E4M3's smallest normal: blocks below it lose
    precision. Ours keeps subnormal scales, because they cost nothing. torchao also multiplies by a
    reciprocal, following a GPU kernel, so that a value within an ulp of a tie can take the other
    neighbour; ours divides."""
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = values(dtype)
    ours = quantize(x, scheme("nvfp4"))
    level = per_tensor_amax_to_scale(x.float().abs().amax())
    assert torch.equal(ours.global_scale.squeeze(), level)
    scale, packed = nvfp4_quantize(x, 16, level)
    scale, codes = scale.float().reshape(ours.scale.shape), torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    normal = ours.scale.float() >= 2.0**-6
    assert 0.3 < normal.float().mean() < 1 and torch.equal(ours.scale.float()[normal], scale[normal])
    assert bool((scale[~normal] == 2.0**-6).all())
    differ = (ours.codes != codes).unflatten(-1, (-1, 16))[normal]
    assert differ.float().mean() < 1e-3
    units = (x.float().unflatten(-1, (-1, 16)) / (scale * level).unsqueeze(-1))[normal][differ].abs()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert bool(((units[:, None] - ties).abs() / ties).amin(-1).le(1e-6).all())


# ---- compressed-tensors ----


@pytest.fixture(scope="module")
def compressed():
    return pytest.importorskip(
        "compressed_tensors.quantization", reason="compressed-tensors is not installed (envs/requirements-dev.txt)"
    )


def integer_arguments(compressed, symmetric, strategy="token", **more):
    return compressed.QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy=strategy, dynamic=strategy == "token", **more
    )


def calculated(x, arguments, groups=1, global_scale=None):
    from compressed_tensors.quantization.utils import calculate_qparams

    blocks = x.unflatten(-1, (groups, -1))
    low, high = blocks.amin(-1), blocks.amax(-1)
    return calculate_qparams(low, high, arguments, global_scale=global_scale)


@pytest.mark.parametrize("strategy, groups", [("token", 1), ("group", 8)])
def test_symmetric_int4_equals_compressed_tensors(compressed, strategy, groups):
    """compressed-tensors maps the largest magnitude to 7.5, our option ``qmax: 7.5``; our default
    is 7, as in QuaRot, SpinQuant and the paper. Its zero row gets the scale eps, ours 0: the values
    are zero in both."""
    x = values()
    arguments = integer_arguments(compressed, True, strategy, **({"group_size": 64} if groups > 1 else {}))
    scale, zero_point = calculated(x, arguments, groups)
    ours = quantize(x, scheme("int4", qmax=7.5, **({"group_size": 64} if groups > 1 else {})))
    used = ours.scale > 0
    assert not used.all() and torch.equal(ours.scale[used], scale[used])
    theirs = compressed.fake_quantize(x, scale, zero_point.float() * 0, arguments)
    assert torch.equal(ours.dequantize(), theirs + 0.0)


def test_asymmetric_int4_equals_compressed_tensors_given_its_parameters(compressed):
    """compressed-tensors counts codes from -8, ours from 0, adds the zero point before rounding,
    where ours rounds first: at ties with an odd zero point they take different neighbours. Ours is
    what integer kernels do, and keeps half to even independent of the offset."""
    x = values()
    arguments = integer_arguments(compressed, False)
    scale, zero_point = calculated(x, arguments)
    ours = quantize(x, activation_scheme("int4"))
    used = x.abs().amax(-1) > 0
    assert torch.allclose(ours.scale[used], scale[used], rtol=2e-7, atol=0)
    shifted = zero_point[used].to(torch.int16) + 8
    assert (ours.zero_point[used].to(torch.int16) - shifted).abs().max() <= 1 and (
        ours.zero_point[used] == shifted
    ).float().mean() > 0.9
    theirs = compressed.fake_quantize(x, scale, zero_point, arguments)
    same = quantize(
        x, activation_scheme("int4"), QuantizationParameters(scale, (zero_point.to(torch.int16) + 8).to(torch.uint8))
    )
    units = (x / scale).abs()
    tie = (units - units.floor() - 0.5).abs() < 1e-4
    odd = same.zero_point % 2 == 1
    assert torch.equal(same.dequantize()[~tie], theirs[~tie] + 0.0) and tie.float().mean() < 0.1
    assert torch.equal(same.dequantize()[tie & ~odd], theirs[tie & ~odd] + 0.0)


def float_arguments(compressed, **fields):
    return compressed.QuantizationArgs(num_bits=4, type="float", symmetric=True, dynamic=False, **fields)


def test_mxfp4_equals_compressed_tensors(compressed):
    """compressed-tensors rounds the largest magnitude before taking its exponent: our rule
    ``even``. Our default is ``floor``, the rule of the OCP specification, which it does not offer.
    A zero block has no exponent there (log2 of 0), ours stores the byte 0."""
    x = values()
    arguments = float_arguments(
        compressed, strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
    )
    from compressed_tensors.quantization.utils import generate_mx_scales

    ours = quantize(x, scheme("mxfp4", scale_rule="even"))
    peak = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    exponent = generate_mx_scales(peak)
    assert torch.equal(ours.scale[peak > 0].float(), exponent[peak > 0])
    scale = torch.exp2(exponent.masked_fill(peak == 0, 0) - 127)
    theirs = compressed.fake_quantize(x, scale, None, arguments)
    assert torch.equal(ours.dequantize(), theirs)


def test_nvfp4_equals_compressed_tensors_but_for_vanishing_blocks(compressed):
    """compressed-tensors stores the inverse of our global scale and divides by it, so that scales
    within an ulp of a tie may differ; a block scale that rounds to zero becomes 0.125 there. The
    block is flushed all the same: its values are below 0.05 in that scale."""
    from compressed_tensors.quantization.utils import generate_gparam

    x = values()
    arguments = float_arguments(
        compressed,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    level = generate_gparam(x.amin(), x.amax())
    ours = quantize(x, scheme("nvfp4"))
    assert torch.allclose(1 / level, ours.global_scale.flatten(), rtol=2e-7)
    scale, _ = calculated(x, arguments, 32, level)
    vanishing = ours.scale.float() == 0
    assert 0.05 < vanishing.float().mean() < 0.5
    assert torch.equal(scale.float()[~vanishing], ours.scale.float()[~vanishing]) and bool(
        (scale.float()[vanishing] == 0.125).all()
    )
    theirs = compressed.fake_quantize(x, scale.float(), None, arguments, global_scale=level)
    assert not theirs.unflatten(-1, (-1, 16))[vanishing].any()
    assert torch.isclose(ours.dequantize(), theirs, rtol=1e-6, atol=0).float().mean() > 0.9999
