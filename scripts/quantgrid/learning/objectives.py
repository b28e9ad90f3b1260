"""What is minimized: the loss of a network on token windows, the error of its layers, or a moment of the weights alone.

An objective has ``count`` items to draw batches from, and ``pieces(values, batch)``, which yields the summands of the loss one after another:
each is sent back before the next is made, so that no more than one layer or one window is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..architecture import LINEARS
from ..transforms.composition import Parameters
from .network import Folding, Network


class Objective(Protocol):
    count: int

    def pieces(self, values: Parameters, batch: list[int]) -> Iterator[Tensor]:
        """Scalars whose sum is the loss of the items ``batch`` under the learned ``values``."""


def squared_error(found: Tensor, wanted: Tensor, error: str) -> Tensor:
    """Squared error of (batch, tokens, d) over the squares of what is wanted: ``squared`` over all at once, so that tokens of large norm
    decide; ``relative`` token by token, so that all count the same."""
    dims = -1 if error == "relative" else (-3, -2, -1)
    return ((found - wanted).square().sum(dims) / wanted.square().sum(dims).clamp(min=torch.finfo(wanted.dtype).tiny)).mean()


class EndToEnd:
    """``cross_entropy`` of the next token (SpinQuant, arXiv 2405.16406), or ``kl_top``: the divergence from the full-precision model over its
    ``top`` likeliest tokens, probabilities taken over the whole vocabulary (OSTQuant, arXiv 2501.13987)."""

    def __init__(self, network: Network, loss: str = "cross_entropy", top: int = 1000):
        self.network, self.loss, self.top, self.count = network, loss, top, len(network.windows)

    def pieces(self, values: Parameters, batch: list[int]) -> Iterator[Tensor]:
        for item in batch:
            window = self.network.windows[item : item + 1]
            yield self._loss(self.network.logits(window, values)[0].float(), window[0]) / len(batch)

    def _loss(self, logits: Tensor, window: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return cross_entropy(logits[:-1], window[1:])
        with torch.no_grad():
            teacher = self.network.model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
            likeliest, where = teacher.topk(min(self.top, teacher.shape[-1]))
        student = logits.log_softmax(-1).gather(-1, where)
        return (likeliest.exp() * (likeliest - student)).sum(-1).mean()


class AllLayers:
    """Mean over the layers of the error of each one's output, every layer fed with what the full-precision model feeds it."""

    def __init__(self, network: Network, error: str):
        self.network, self.error, self.count = network, error, len(network.windows)

    def pieces(self, values: Parameters, batch: list[int]) -> Iterator[Tensor]:
        network, layers = self.network, len(self.network.layers)
        hidden = network.embedded(network.windows[batch])
        for index in range(layers):
            wanted = network.full_precision_layer(index, hidden)
            entered, out = network.ends(hidden, values)
            found = network.layer(index, entered, values)
            yield squared_error(found if out["back"] is None else found @ out["back"], wanted, self.error) / layers
            hidden = wanted


class OneLayer:
    """Error of one layer's output on ``inputs``, (windows, tokens, d), against ``wanted``, of the same shape."""

    def __init__(self, network: Network, index: int, inputs: Tensor, wanted: Tensor, error: str):
        self.network, self.index, self.inputs, self.wanted, self.error, self.count = network, index, inputs, wanted, error, len(inputs)

    def pieces(self, values: Parameters, batch: list[int]) -> Iterator[Tensor]:
        yield squared_error(self.network.layer(self.index, self.inputs[batch], values), self.wanted[batch], self.error)


class FourthPower:
    """Fourth power of the folded weights over the square of their second: their kurtosis about zero, averaged over the linears; the items
    are layers. ``sign`` -1 maximizes it."""

    def __init__(self, folding: Folding, sign: float = 1.0):
        self.folding, self.sign, self.count = folding, sign, folding.shape.layers

    def pieces(self, values: Parameters, batch: list[int]) -> Iterator[Tensor]:
        for index in batch:
            weights = self.folding.fold(index, values).weights
            kurtosis = torch.stack([weights[linear].pow(4).mean() / weights[linear].square().mean().square() for linear in LINEARS])
            yield self.sign * kurtosis.mean() / len(batch)
