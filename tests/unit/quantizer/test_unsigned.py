"""Unsigned FP4 with a zero point: every code, every tie, and what it is for: one-sided and
short-tailed activations."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from quantgrid.ground.errors import ConfigError
from quantgrid.quantizer import fake_quantize, find_parameters, quantize
from quantgrid.quantizer.rounding import decode, encode
from quantgrid.schemes import QuantScheme, activation_scheme, scheme
from quantgrid.schemes.number_formats import ELEMENT_FORMATS

TABLES = {
    "ue2m2": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7],
    "ue3m1": [0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24],
}
NAMES = pytest.mark.parametrize("name", TABLES)


@NAMES
def test_every_code(name):
    assert list(ELEMENT_FORMATS[name].values()) == TABLES[name]


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step, zero", [(1.0, 0.0), (0.5, -3.0), (2.0, -0.25)])
def test_every_tie_neighbour_and_saturation(name, dtype, step, zero):
    table, used = np.array(TABLES[name]), QuantScheme(name, symmetric=False)
    ties = torch.tensor((table[1:] + table[:-1]) / 2, dtype=dtype)
    units = torch.cat(
        [torch.tensor(table, dtype=dtype), ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)]
    )
    units = torch.cat(
        [units, torch.tensor([-5.0, -0.0, 7.4, 30, 1e20], dtype=dtype), torch.rand(2000, dtype=dtype) * table[-1]]
    )
    step, zero = torch.tensor(step), torch.tensor(zero)
    x = units * step + zero
    exact = (x - zero) / step  # what is left of the units in this dtype
    distance = np.abs(exact.numpy()[:, None].clip(0, table[-1]) - table)
    expected = np.where(distance == distance.min(1, keepdims=True), np.arange(16) % 2, 2).argmin(1)
    codes = encode(x, step, zero, used)
    assert codes.dtype == torch.uint8 and np.array_equal(codes.numpy(), expected)
    values = decode(codes, step, zero, used, dtype)
    assert torch.equal(values, torch.tensor(table, dtype=dtype)[codes.long()] * step + zero)


@NAMES
def test_the_zero_point_is_the_minimum_and_the_range_contains_zero(name):
    x = torch.tensor([[-0.25, 1.0, 3.0, 0.5], [1.0, 2.0, 3.0, 4.0], [-4.0, -3.0, -2.0, -1.0], [0.0] * 4])
    found = find_parameters(x, activation_scheme("fp4", element=name))
    limit = TABLES[name][-1]
    assert found.zero_point.dtype == torch.float32 and found.zero_point.flatten().tolist() == [-0.25, 0, -4, 0]
    assert found.scale.flatten().tolist() == pytest.approx([3.25 / limit, 4 / limit, 4 / limit, 0])
    values = fake_quantize(x, activation_scheme("fp4", element=name))
    assert values[0, 0] == -0.25 and values[1, 3] == pytest.approx(4) and values[2, 0] == -4 and not values[3].any()


@NAMES
def test_one_sided_zeros_stay_zero(name):
    x = torch.relu(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    assert not fake_quantize(x, activation_scheme("fp4", element=name))[x == 0].any()


def test_short_tails_gain_from_it():
    """After SiLU values lie above -0.28: the sixteen codes of E2M1 spend half of themselves on a
    range that is hardly there."""
    x = silu(2 * torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
    schemes = {name: activation_scheme("fp4", element=name, group_size=32) for name in ("e2m1", *TABLES)}
    errors = {name: float((fake_quantize(x, used) - x).square().mean()) for name, used in schemes.items()}
    assert errors["ue2m2"] < 0.5 * errors["e2m1"] and errors["ue3m1"] < errors["e2m1"]


@NAMES
def test_bits_count_the_minimum(name):
    assert (
        quantize(torch.randn(4, 64), scheme("fp4", element=name, group_size=32, scale_format="e8m0")).bits()
        == 4 + (8 + 32) / 32
    )


@NAMES
def test_symmetric_is_refused(name):
    with pytest.raises(ConfigError, match="symmetric: false"):
        activation_scheme("fp4", element=name, symmetric=True)
