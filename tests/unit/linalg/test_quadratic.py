"""The quadratic form of a weight and a second moment, against its definition on the inputs."""

from __future__ import annotations

import pytest
import torch

from quantgrid.linalg.quadratic import output_square


@pytest.mark.parametrize("columns", [96, 192, 193, 500])
def test_the_output_square_counts_every_block_of_the_moment(columns):
    generator = torch.Generator().manual_seed(columns)
    weight, x = (torch.randn(rows, columns, generator=generator) for rows in (33, 2 * columns))
    found = output_square(weight, x.mT @ x / len(x))
    torch.testing.assert_close(
        found.double(), (x.double() @ weight.double().mT).square().sum() / len(x), rtol=1e-5, atol=0
    )


def test_the_output_square_is_summed_in_the_dtype_that_is_asked_for():
    """A part of 1 is lost beside 2^26 in float32."""
    weight, moment = torch.tensor([[2.0**13, 1.0]]), torch.eye(2)
    assert output_square(weight, moment).item() == 2.0**26
    assert output_square(weight, moment, torch.float64).item() == 2.0**26 + 1
    assert output_square(weight, moment, torch.float64).dtype == torch.float64
