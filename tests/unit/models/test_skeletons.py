"""Empty modules filled by name: parameters, and buffers that are part of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantgrid.ground.errors import ConfigError
from quantgrid.models.skeletons import fill, require_filled


class Buffered(nn.Module):
    """A linear with a persistent buffer of integers, one of numbers, and one that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, device="meta")
        self.register_buffer("bias_of_experts", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("order", torch.zeros(4, dtype=torch.int32))
        self.register_buffer("frequencies", torch.ones(2), persistent=False)


STORED = {
    "layer.linear.weight": torch.arange(6.0).view(2, 3),
    "layer.linear.bias": torch.ones(2),
    "layer.bias_of_experts": torch.arange(4.0),
    "layer.order": torch.tensor([3, 1, 2, 0]),
    "layer.frequencies": torch.full((2,), 7.0),
    "other.order": torch.tensor([9, 9, 9, 9]),
}


def test_parameters_and_persistent_buffers_are_read():
    """Parameters in the wanted dtype, buffers in their own."""
    module = Buffered()
    fill(module, "layer.", STORED, torch.bfloat16, "cpu")
    require_filled(module, "layer.", Path("model"), STORED)
    assert torch.equal(module.linear.weight, STORED["layer.linear.weight"].bfloat16())
    assert torch.equal(module.bias_of_experts, torch.arange(4.0, dtype=torch.float64))
    assert module.order.tolist() == [3, 1, 2, 0] and module.order.dtype == torch.int32
    assert module.frequencies.tolist() == [1, 1]
    module.linear.weight.data.zero_()
    assert STORED["layer.linear.weight"].any()  # a copy


@pytest.mark.parametrize("name", ["bias_of_experts", "order", "linear.bias"])
def test_a_missing_tensor_is_named(name):
    module, held = Buffered(), {key: tensor for key, tensor in STORED.items() if key != f"layer.{name}"}
    fill(module, "layer.", held, torch.float32, "cpu")
    with pytest.raises(ConfigError, match=rf"model: tensor layer\.{name} is missing \(1 in all\)"):
        require_filled(module, "layer.", Path("model"), held)


def test_a_filled_module_is_not_filled_again():
    module = Buffered()
    fill(module, "layer.", STORED, torch.float32, "cpu")
    module.linear.weight.data.fill_(5.0)
    fill(module, "layer.", STORED, torch.float32, "cpu")
    assert (module.linear.weight == 5).all()
