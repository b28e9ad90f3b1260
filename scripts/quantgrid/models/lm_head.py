"""Logits from final hidden states: lm_head, bias, scale and softcap of a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .canonical import family_of
from .family import Family


@dataclass(frozen=True)
class Head:
    """Logits c tanh((scale h Wᵀ + scale b) / c) of hidden states h, without tanh if ``softcap`` is None.

    ``weight`` W (vocabulary, d), ``bias`` b (vocabulary,) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, family: Family, config: Mapping[str, Any], weight: Tensor, bias: Tensor | None = None) -> Head:
        """Head of a family under a transformers ``config``."""
        given = {use: {**family.defaults, **config}.get(key) for use, key in family.logits.items()}
        scale = (1.0 if given.get("multiply") is None else given["multiply"]) / (given.get("divide") or 1.0)
        return cls(weight, bias, scale, given.get("softcap"))

    def __call__(self, hidden: Tensor) -> Tensor:
        """``hidden`` (*batch, d) -> logits (*batch, vocabulary)."""
        logits = linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Head:
        """Return the head with its tensors on ``device`` in ``dtype``."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)


def head_of(model: nn.Module) -> Head:
    """Head of a transformers model."""
    return Head.of(family_of(model), model.config.to_dict(), model.lm_head.weight, model.lm_head.bias)
