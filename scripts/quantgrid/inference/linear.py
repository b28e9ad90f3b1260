"""Quantized linear layer: online transform, rounding, matrix product, low-rank branch.

The linears of one site (q, k, v; gate, up) share one :class:`SiteInput`, which prepares their
common input once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..machine.devices import Placement, solver_dtype
from ..quantizer.ranges import clamp_ranges
from ..quantizer.scales import QuantizationParameters
from ..quantizer.tensors import fake_quantize
from ..schemes.quant_scheme import QuantScheme
from .online import apply, tensors_of

CLIP = ("clip_low", "clip_high")


class Rounding(nn.Module):
    """Rounding of an activation in ``scheme``.

    ``fixed`` holds calibrated parameters: all of a scheme with one scale per tensor (``scale``,
    ``zero_point``, ``global_scale``), only ``global_scale`` for a static global scale, none for
    per-token scales. It also holds learned limits of ranges computed at run time (``clip_low``,
    ``clip_high``, see ``primitives/learned_clip.py``).
    """

    def __init__(self, scheme: QuantScheme, fixed: Mapping[str, Tensor]):
        super().__init__()
        self.scheme, self.fixed = scheme, tuple(fixed)
        for part, tensor in fixed.items():
            self.register_buffer(part, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` (*batch, tokens, n); shape and dtype are unchanged."""
        return self.round(self.clip(x))

    def clip(self, x: Tensor) -> Tensor:
        """Clamp ``x`` to its learned limits, if any."""
        if "clip_low" not in self.fixed:
            return x
        return clamp_ranges(
            x, self.clip_low, self.clip_high, self.scheme.group_size or x.shape[-1], self.scheme.symmetric
        )

    def round(self, x: Tensor) -> Tensor:
        """Round ``x`` without clamping."""
        fixed = {part: getattr(self, part) for part in self.fixed if part not in CLIP}
        if fixed and "scale" not in fixed:
            return fake_quantize(x, self.scheme, **fixed)
        return fake_quantize(x, self.scheme, QuantizationParameters(**fixed) if fixed else None)


class SiteInput(nn.Module):
    """Preparation of a site's input: online operations in order, then rounding, if any.

    ``online`` is a list as described in :mod:`quantgrid.inference.online`; its tensors become
    buffers in the dtype of the running model. ``consumers`` linears request the same tensor one
    after another. The prepared tensor is kept until the last request, together with its unrounded
    version for branches that read that.
    """

    def __init__(self, online: list[dict[str, Any]], rounding: Rounding | None, consumers: int):
        super().__init__()
        self.rounding, self.consumers = rounding, consumers
        self.online = [
            {name: value for name, value in operation.items() if not isinstance(value, Tensor)} for operation in online
        ]
        # tensor names of each operation
        self.held = [tuple(tensors_of(operation)) for operation in online]
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
        """Input that the codes of a linear are multiplied with."""
        return self.round(self.transform(x))

    def transform(self, x: Tensor) -> Tensor:
        for number, operation in enumerate(self.online):
            x = apply(
                {**operation, **{name: getattr(self, f"online_{number}_{name}") for name in self.held[number]}}, x
            )
        return x

    def round(self, x: Tensor) -> Tensor:
        return x if self.rounding is None else self.rounding(x)


class QuantizedLinear(nn.Module):
    """y = Ŵ x̂ + left (right x̂) + bias with the prepared input x̂ of the site.

    ``weight`` (m, n) holds the dequantized codes. With ``branch_input`` ``unquantized`` the
    low-rank branch reads the unrounded input; with ``rounded`` off the weight does too.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        site_input: SiteInput,
        low_rank: tuple[Tensor, Tensor] | None = None,
        branch_input: str = "quantized",
        rounded: bool = True,
    ):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.left, self.right = (
            (nn.Parameter(factor, requires_grad=False) for factor in low_rank) if low_rank else (None, None)
        )
        self.site_input, self.branch_input, self.rounded = site_input, branch_input, rounded

    def forward(self, x: Tensor) -> Tensor:
        x, exact = self.site_input(x)
        y = linear(x if self.rounded else exact, self.weight, self.bias)
        if self.left is None:
            return y
        return y.add_(linear(linear(exact if self.branch_input == "unquantized" else x, self.right), self.left))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of ``compute.dtype`` in the config; ``auto`` is bfloat16 on a GPU and float32 on a
    CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def compute_device(name: str) -> torch.device:
    """Device of ``compute.device`` in the config; ``auto`` is a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def placement(compute: Mapping[str, Any]) -> Placement:
    """Placement of the layers of a job under ``compute`` of the config."""
    device = compute_device(compute["device"])
    return Placement(device, solver_dtype(compute["solver_dtype"], device))
