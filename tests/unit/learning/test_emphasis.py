"""Emphasis of output errors: none is the plain error, weights and shares act as stated."""

from __future__ import annotations

import math

import pytest
import torch

from quantgrid.ground.errors import NumericalFailure
from quantgrid.learning.emphasis import Emphasis
from quantgrid.learning.objectives import OneLayer, squared_error
from quantgrid.learning.session import Session
from quantgrid.learning.trainables import Free, SignDescent
from quantgrid.learning.training import Settings, evaluate, minimize
from quantgrid.linalg.hadamard import random_orthogonal


def outputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(found, wanted) (windows, tokens, d)."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(2, 20, 10, generator=generator, dtype=torch.float64)
    return wanted + 0.1 * torch.randn(wanted.shape, generator=generator, dtype=torch.float64), wanted


def error(emphasis: Emphasis, found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = emphasis.weighted(wanted)
    return squared_error(emphasis.counted(found, wanted), wanted, "squared").item()


def test_no_weight_and_no_share_is_the_plain_error():
    found, wanted = outputs()
    plain = squared_error(found, wanted, "squared").item()
    assert error(Emphasis(), found, wanted) == plain
    assert error(Emphasis(torch.ones(10, dtype=torch.float64)), found, wanted) == plain
    assert error(Emphasis(None, 0.001, 0.001), found, wanted) == plain  # of 400 errors, 0.4 are left out


def test_weights_count_squares_and_their_scale_does_not_matter():
    found, wanted = outputs()
    weights = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_hand = (weights * (found - wanted) ** 2).sum() / (weights * wanted**2).sum()
    assert error(Emphasis(weights), found, wanted) == pytest.approx(by_hand.item())
    assert error(Emphasis(7 * weights), found, wanted) == pytest.approx(by_hand.item())


def test_weights_count_behind_the_map_back():
    """Outputs of a rotated stream have the error of the unrotated ones; without weights no map is needed."""
    found, wanted = outputs()
    weights = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = random_orthogonal(10, 3)
    turned, back = [part @ rotation for part in (found, wanted)], rotation.mT
    plain, ones = error(Emphasis(weights), found, wanted), torch.ones(10, dtype=torch.float64)
    assert error(Emphasis(weights, back=back), *turned) == pytest.approx(plain)
    assert error(Emphasis(weights), *turned) != pytest.approx(plain, rel=0.01)
    assert error(Emphasis(ones, back=back), *turned) == pytest.approx(error(Emphasis(), *turned))


def test_shares_leave_out_the_smallest_and_the_largest_errors():
    found, wanted = outputs()
    squares = (found - wanted).square().flatten().sort().values
    for low, high in ((0.0, 0.05), (0.5, 0.0), (0.25, 0.01)):
        left = squares[int(low * 400) : 400 - int(high * 400)].sum() / wanted.square().sum()
        assert error(Emphasis(None, low, high), found, wanted) == pytest.approx(left.item())


def test_the_order_of_tokens_and_channels_does_not_matter_and_larger_shares_leave_less():
    found, wanted = outputs()
    tokens, channels = (torch.randperm(count, generator=torch.Generator().manual_seed(2)) for count in (20, 10))
    moved = [part[:, tokens][:, :, channels] for part in (found, wanted)]
    sizes = [error(Emphasis(None, 0.0, share), found, wanted) for share in (0.0, 0.01, 0.1, 0.4)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert error(Emphasis(None, 0.0, 0.1), *moved) == pytest.approx(sizes[2])


def test_errors_that_are_left_out_have_no_gradient():
    found, wanted = outputs()
    found.requires_grad_()
    emphasis = Emphasis(None, 0.1, 0.1)
    squared_error(emphasis.counted(found, wanted), wanted, "squared").backward()
    assert int((found.grad == 0).sum()) == 80


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shares", [(0.0, 0.1), (0.1, 0.0), (0.4, 0.4)])
def test_an_error_that_is_not_finite_is_never_left_out(value, shares):
    found, wanted = outputs()
    found[1, 3, 2] = value
    assert not math.isfinite(error(Emphasis(None, *shares), found, wanted))


class Passing:
    """Network whose layer adds its one value ``offset`` (windows, tokens, d) to the hidden states."""

    def layer(self, index: int, hidden: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        return hidden + values["offset"]


def test_trained_windows_are_trimmed_and_the_ones_that_decide_are_not():
    """An end whose trimmed error is lower and whose whole error is higher is not the better one."""
    hidden = outputs()[1].repeat(2, 1, 1)
    objective = OneLayer(Passing(), 2, 0, hidden, hidden, "squared", Emphasis(None, trim_high=0.01))
    start = torch.full((20, 10), 0.1, dtype=torch.float64)
    end = torch.full_like(start, 0.05)
    end[0, 0] = 3.0
    trained = [sum(objective.pieces({"offset": offset}, [0, 1])).item() for offset in (start, end)]
    decisive = [evaluate(objective, {"offset": offset}) for offset in (start, end)]
    assert trained[1] < trained[0] and decisive[1] > decisive[0]
    energy = hidden[2:].square().sum()
    assert decisive == pytest.approx([2 * (offset.square().sum() / energy).item() for offset in (start, end)])


def test_a_training_stops_at_an_output_that_is_not_finite():
    hidden = outputs()[1].repeat(2, 1, 1)
    objective = OneLayer(Passing(), 2, 0, hidden, hidden, "squared", Emphasis(None, trim_high=0.1))
    offset = torch.full((20, 10), 0.1, dtype=torch.float64)
    offset[3, 4] = float("nan")
    free = Free({"offset": offset})
    steps = SignDescent([{"params": list(free.parameters()), "initial_lr": 0.1}])
    with pytest.raises(NumericalFailure, match="part '0': the loss is not finite at step 1"):
        minimize(free, steps, objective, Settings(3, 2, {}), Session(None), "0")
