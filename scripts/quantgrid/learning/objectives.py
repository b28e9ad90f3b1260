"""What is minimized: the loss of a network on token windows, the error of its layers, or a moment of the weights alone.

An objective has ``count`` items to draw batches from, numbered from 0, and others on which start and end of a training are ``compared``: the
last windows, which no batch holds. ``pieces(values, batch)`` yields the summands of the loss one after another: each is sent back before the
next is made, so that no more than one layer, or the windows of ``resources.PIECE`` tokens, is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..architecture import LINEARS
from ..errors import ConfigError
from ..resources import PIECE
from ..transforms.composition import Parameters
from .network import Folding, Network

CACHE = 1 << 29  # bytes of full-precision probabilities kept for the next time that their window comes


class Objective(Protocol):
    count: int
    compared: Sequence[int]

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        """Scalars whose sum is the loss of the items ``batch`` under the learned ``values``."""


def squared_error(found: Tensor, wanted: Tensor, error: str) -> Tensor:
    """Squared error of (batch, tokens, d) over the squares of what is wanted: ``squared`` over all at once, so that tokens of large norm
    decide; ``relative`` token by token, so that all count the same."""
    dims = -1 if error == "relative" else (-3, -2, -1)
    return ((found - wanted).square().sum(dims) / wanted.square().sum(dims).clamp(min=torch.finfo(wanted.dtype).tiny)).mean()


def together(items: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """``items``, windows of ``tokens`` each, in pieces of at most ``PIECE`` tokens or one window."""
    size = max(1, PIECE // tokens)
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def divided(windows: int, held_out: int) -> tuple[int, range]:
    """``count`` and ``compared`` of an objective whose items are ``windows``, the last ``held_out`` of them left out of the training.

    Raises :class:`ConfigError` where no window is left to train on.
    """
    if windows <= held_out:
        raise ConfigError(f"a training that holds {held_out} windows out needs more than its {windows}; raise 'windows' of the corpus")
    return windows - held_out, range(windows - held_out, windows)


class EndToEnd:
    """``cross_entropy`` of the next token (SpinQuant, arXiv 2405.16406), or ``kl_top``: the divergence from the full-precision model over its
    ``top`` likeliest tokens, probabilities taken over the whole vocabulary (OSTQuant, arXiv 2501.13987)."""

    def __init__(self, network: Network, held_out: int, loss: str = "cross_entropy", top: int = 1000):
        self.network, self.loss, self.top = network, loss, top
        self.count, self.compared = divided(len(network.windows), held_out)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for items in together(batch, self.network.windows.shape[1]):
            windows = self.network.windows[items]
            logits = self.network.logits(windows, values).float()
            if self.loss == "cross_entropy":
                loss = cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
            else:
                loss = self._divergence(logits, items)
            yield loss * (len(items) / len(batch))

    def _divergence(self, logits: Tensor, items: list[int]) -> Tensor:
        likeliest, where = (torch.stack(parts).to(logits.device) for parts in zip(*(self._likeliest(item) for item in items)))
        student = logits.gather(-1, where.long()) - logits.logsumexp(-1, keepdim=True)
        return (likeliest.exp() * (likeliest - student)).sum(-1).mean()

    @torch.no_grad()
    def _likeliest(self, item: int) -> tuple[Tensor, Tensor]:
        """Logarithms of the full-precision model's ``top`` probabilities at every token of a window, and their tokens (tokens, top)."""
        if item in self._known:
            return self._known[item]
        logits = self.network.model(self.network.windows[item : item + 1], use_cache=False).logits[0].float().log_softmax(-1)
        likeliest, where = logits.topk(min(self.top, logits.shape[-1]))
        found = likeliest.cpu(), where.to("cpu", torch.int32)
        if (len(self._known) + 1) * 8 * likeliest.numel() <= CACHE:
            self._known[item] = found
        return found


class AllLayers:
    """Mean over the layers of the ``relative`` error of each one's output, every layer fed with what the full-precision model feeds it."""

    def __init__(self, network: Network, held_out: int):
        self.network = network
        self.count, self.compared = divided(len(network.windows), held_out)

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        network, layers = self.network, len(self.network.layers)
        for items in together(batch, network.windows.shape[1]):
            share, hidden = len(items) / len(batch) / layers, network.embedded(network.windows[items])
            for index in range(layers):
                wanted = network.full_precision_layer(index, hidden)
                entered, out = network.ends(hidden, values)
                found = network.layer(index, entered, values)
                yield squared_error(found if out["back"] is None else found @ out["back"], wanted, "relative") * share
                hidden = wanted


class OneLayer:
    """Error of one layer's output on ``inputs``, (windows, tokens, d), against ``wanted``, of the same shape."""

    def __init__(self, network: Network, held_out: int, index: int, inputs: Tensor, wanted: Tensor, error: str):
        self.network, self.index, self.inputs, self.wanted, self.error = network, index, inputs, wanted, error
        self.count, self.compared = divided(len(inputs), held_out)

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        energy = self.wanted[list(batch)].square().sum()
        for items in together(batch, self.inputs.shape[1]):
            wanted = self.wanted[items]
            share = len(items) / len(batch) if self.error == "relative" else wanted.square().sum() / energy
            yield squared_error(self.network.layer(self.index, self.inputs[items], values), wanted, self.error) * share


class FourthPower:
    """Fourth power of the folded weights over the square of their second: their kurtosis about zero, averaged over the linears; the items
    are layers. ``sign`` -1 maximizes it."""

    def __init__(self, folding: Folding, sign: float = 1.0):
        self.folding, self.sign, self.count = folding, sign, folding.shape.layers
        self.compared = range(self.count)  # no tokens, nothing to hold out

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for index in batch:
            weights = self.folding.fold(index, values).weights
            kurtosis = torch.stack([weights[linear].pow(4).mean() / weights[linear].square().mean().square() for linear in LINEARS])
            yield self.sign * kurtosis.mean() / len(batch)
