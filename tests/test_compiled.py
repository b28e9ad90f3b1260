"""The compiled kernel gives the bits of ``fake_quantize``; it needs a C++ compiler."""

import math
import shutil

import pytest
import torch

from quantgrid.compiled import compile_fake_quantize
from quantgrid.errors import ConfigError, NumericalFailure
from quantgrid.quantizer import activation_scheme, fake_quantize, scheme
from selection import others_slow

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for torch.compile")
SCHEMES = {
    "int4 token": activation_scheme("int4"),
    "int4 symmetric": scheme("int4", clip_ratio=0.9),
    "nvfp4 token": activation_scheme("nvfp4"),
    "mxfp4": activation_scheme("mxfp4"),
    "unsigned": activation_scheme("fp4_ue2m2", group_size=32),
}


def tensor(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator)) + 0.1
    x[-1] = 0.0
    x[0, :48] = -1e-6
    return x.to(dtype)


@needs_compiler
@pytest.mark.parametrize("key, dtype", others_slow([*((key, torch.bfloat16) for key in SCHEMES),
                                                    *((key, torch.float32) for key in ("nvfp4 token", "int4 symmetric"))],
                                                   lambda key, dtype: (key, dtype) == ("int4 token", torch.bfloat16)))
def test_equal_bits(key, dtype):
    kernel, integer = compile_fake_quantize(SCHEMES[key]), torch.int16 if dtype == torch.bfloat16 else torch.int32
    for x in (tensor(14, dtype), tensor(14, dtype).unflatten(0, (2, 7)), tensor(28, dtype)[::2]):
        assert torch.equal(kernel(x).view(integer), fake_quantize(x, SCHEMES[key]).view(integer))
    assert kernel(torch.empty(0, 96, dtype=dtype)).shape == (0, 96)


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_named(bad):
    x = tensor(64, torch.bfloat16)
    x[1, 1] = bad
    with pytest.raises(NumericalFailure, match="1 NaN" if math.isnan(bad) else "1 infinite"):
        compile_fake_quantize(SCHEMES["int4 token"])(x)


@pytest.mark.parametrize("refused", [scheme("nvfp4"), scheme("int4", range="mse"), scheme("nf4"), scheme("int4", granularity="tensor")])
def test_schemes_without_a_kernel_are_refused(refused):
    with pytest.raises(ConfigError, match="compile_fake_quantize takes"):
        compile_fake_quantize(refused)
