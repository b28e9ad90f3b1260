"""What a quantized model computes in the place of a linear layer: online transform, rounding, matrix product, low-rank branch.

The linears of one site (q, k, v; gate, up) share one :class:`SiteInput`, which prepares their common input once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .online import apply, tensors_of
from .quantizer import QuantizationParameters, QuantScheme, fake_quantize, find_parameters
from .ranges import clamp_ranges

CLIP = ("clip_low", "clip_high")


class Rounding(nn.Module):
    """Rounds a tensor of the running model in ``scheme``.

    ``fixed`` holds what calibration settled beforehand: all parameters of a scheme with one scale per tensor (``scale``, ``zero_point``,
    ``global_scale``), the ``global_scale`` alone of one with a static global scale, nothing where every token finds its own; and the learned
    limits of ranges found at run time (``clip_low``, ``clip_high``, see ``transforms/learned_clip.py``).
    """

    def __init__(self, scheme: QuantScheme, fixed: Mapping[str, Tensor]):
        super().__init__()
        self.scheme, self.fixed = scheme, tuple(fixed)
        for part, tensor in fixed.items():
            self.register_buffer(part, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (*batch, tokens, n) -> the same shape and dtype."""
        return self.round(self.clip(x))

    def clip(self, x: Tensor) -> Tensor:
        """``x`` within its learned limits, if there are any."""
        if "clip_low" not in self.fixed:
            return x
        return clamp_ranges(x, self.clip_low, self.clip_high, self.scheme.group_size or x.shape[-1], self.scheme.symmetric)

    def round(self, x: Tensor) -> Tensor:
        """``x`` rounded as it is."""
        fixed = {part: getattr(self, part) for part in self.fixed if part not in CLIP}
        if fixed and "scale" not in fixed:
            return fake_quantize(x, self.scheme, find_parameters(x, self.scheme, fixed["global_scale"]), check=False)
        return fake_quantize(x, self.scheme, QuantizationParameters(**fixed) if fixed else None)


class SiteInput(nn.Module):
    """Prepares the input of a site: online operations in order, then the rounding of its activation scheme, if it has one.

    ``online`` is a list as :mod:`quantgrid.online` describes; its tensors, in the dtype of the running model, become buffers.
    ``consumers`` linears ask for the same tensor one after another; the prepared one is kept until the last has it, and beside it what
    it was before it was rounded, for the branches that are fed with that.
    """

    def __init__(self, online: list[dict[str, Any]], rounding: Rounding | None, consumers: int):
        super().__init__()
        self.rounding, self.consumers = rounding, consumers
        self.online = [{name: value for name, value in operation.items() if not isinstance(value, Tensor)} for operation in online]
        self.held = [tuple(tensors_of(operation)) for operation in online]  # names of the tensors of each operation
        for number, operation in enumerate(online):
            for name, tensor in tensors_of(operation).items():
                self.register_buffer(f"online_{number}_{name}", tensor, persistent=False)
        self._source: Tensor | None = None
        self._prepared: tuple[Tensor, Tensor] | None = None
        self._asked = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (*batch, tokens, n) -> (rounded, not rounded), both in the same shape and dtype."""
        if self._source is not x:
            exact = self.transform(x)
            self._source, self._prepared, self._asked = x, (self.round(exact), exact), 0
        prepared = self._prepared
        self._asked += 1
        if self._asked == self.consumers:
            self._source = self._prepared = None
        return prepared

    def prepare(self, x: Tensor) -> Tensor:
        """What the codes of a linear are multiplied with."""
        return self.round(self.transform(x))

    def transform(self, x: Tensor) -> Tensor:
        for number, operation in enumerate(self.online):
            x = apply({**operation, **{name: getattr(self, f"online_{number}_{name}") for name in self.held[number]}}, x)
        return x

    def round(self, x: Tensor) -> Tensor:
        return x if self.rounding is None else self.rounding(x)


class QuantizedLinear(nn.Module):
    """y = Ŵ x̂ + left (right x̂) + bias with x̂ the site's prepared input; ``weight`` (m, n) holds the dequantized codes.

    ``branch_input`` ``unquantized`` feeds the low-rank branch with the input as it was before it was rounded; with ``rounded`` off, so is the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, site_input: SiteInput, low_rank: tuple[Tensor, Tensor] | None = None,
                 branch_input: str = "quantized", rounded: bool = True):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.left, self.right = (nn.Parameter(factor, requires_grad=False) for factor in low_rank) if low_rank else (None, None)
        self.site_input, self.branch_input, self.rounded = site_input, branch_input, rounded

    def forward(self, x: Tensor) -> Tensor:
        x, exact = self.site_input(x)
        y = linear(x if self.rounded else exact, self.weight, self.bias)
        if self.left is None:
            return y
        return y.add_(linear(linear(exact if self.branch_input == "unquantized" else x, self.right), self.left))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's ``compute.dtype``; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def compute_device(name: str) -> torch.device:
    """The device of a config's ``compute.device``; ``auto`` is a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
