"""Schemes and tensors for the tests of the quantizer."""

import math
from dataclasses import replace

import ml_dtypes
import torch

from quantgrid.schemes import PRESETS, QuantScheme, activation_scheme, scheme

FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def computed(used: QuantScheme | None) -> QuantScheme | None:
    """``used`` with a global scale that the tensor determines where the caller gives it."""
    given = used is not None and used.global_scale in ("static", "site")
    return replace(used, global_scale="tensor") if given else used


SCHEMES = {
    f"{name} {tensor}": computed(found)
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
    **{
        f"{name} scales": scheme("nvfp4", scale_format=name)
        for name in ("e5m2", "e3m2", "e2m3", "e2m1", "int4", "fp16", "e8m0")
    },
}
EVERY = {**SCHEMES, **VARIANTS}


def width(used: QuantScheme, wanted: int) -> int:
    """Smallest multiple of ``wanted`` that the groups of ``used`` divide."""
    return math.lcm(wanted, used.group_size or 1)


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
