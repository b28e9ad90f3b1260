"""Objectives of a training: loss on token windows, layer output error, or a moment of the weights.

An objective has ``count`` items for batches, numbered from 0, and held-out items ``compared``
(the last windows, in no batch) that decide between initial and trained parameters.
``pieces(values, batch)`` yields the summands of the loss. The backward pass of each runs before the
next is computed, so only one layer, or the windows of ``memory.PIECE`` tokens, is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ground.errors import ConfigError
from ..inference.transform import Parameters
from ..machine.memory import PIECE
from ..models.lm_head import head_of
from .emphasis import Emphasis
from .head_loss import divergence
from .network import Folding, Network

# bytes of cached full-precision probabilities of windows
CACHE = 1 << 29


class Objective(Protocol):
    count: int
    compared: Sequence[int]

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        """Scalars that sum to the loss of the items ``batch`` under the learned ``values``."""


def squared_error(found: Tensor, wanted: Tensor, error: str) -> Tensor:
    """Squared error of (batch, tokens, d) relative to the squares of ``wanted``.

    ``squared`` divides totals, so tokens of large norm dominate; ``relative`` divides per token, so
    all tokens weigh the same.
    """
    dims = -1 if error == "relative" else (-3, -2, -1)
    return (
        (found - wanted).square().sum(dims) / wanted.square().sum(dims).clamp(min=torch.finfo(wanted.dtype).tiny)
    ).mean()


def together(items: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Split ``items``, windows of ``tokens`` each, into pieces of at most ``PIECE`` tokens or one
    window."""
    size = max(1, PIECE // tokens)
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def divided(windows: int, held_out: int) -> tuple[int, range]:
    """``count`` and ``compared`` of an objective on ``windows`` items, the last ``held_out`` not
    trained on.

    Raises :class:`ConfigError` if no window is left to train on.
    """
    if windows <= held_out:
        raise ConfigError(
            f"training with {held_out} held-out windows needs more than the given {windows}; raise 'windows'"
        )
    return windows - held_out, range(windows - held_out, windows)


class EndToEnd:
    """``cross_entropy`` of the next token (SpinQuant, arXiv 2405.16406), or ``kl_top``.

    ``kl_top`` is the divergence from the full-precision model over its ``top`` most likely tokens,
    with probabilities over the whole vocabulary (OSTQuant, arXiv 2501.13987).
    """

    def __init__(self, network: Network, held_out: int, loss: str = "cross_entropy", top: int = 1000):
        self.network, self.loss, self.top = network, loss, top
        self.count, self.compared = divided(len(network.windows), held_out)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for items in together(batch, self.network.windows.shape[1]):
            windows = self.network.windows[items]
            hidden = self.network.last_hidden(windows, values).float()
            if self.loss == "cross_entropy":
                hidden, where = hidden[:, :-1], windows[:, 1:].unsqueeze(-1)
                likeliest = torch.zeros(where.shape, device=hidden.device)
            else:
                known = zip(*(self._likeliest(item) for item in items))
                likeliest, where = (torch.stack(parts).to(hidden.device) for parts in known)
            head = head_of(self.network.model)
            loss = divergence(hidden.flatten(0, 1), head, likeliest.flatten(0, 1), where.flatten(0, 1).long())
            yield loss * (len(items) / len(batch))

    @torch.no_grad()
    def _likeliest(self, item: int) -> tuple[Tensor, Tensor]:
        """Full-precision log-probabilities of the ``top`` tokens at each position, and these
        tokens.

        Both are (tokens, top).
        """
        if item in self._known:
            return self._known[item]
        logits = (
            self.network.model(self.network.windows[item : item + 1], use_cache=False).logits[0].float().log_softmax(-1)
        )
        likeliest, where = logits.topk(min(self.top, logits.shape[-1]))
        found = likeliest.cpu(), where.to("cpu", torch.int32)
        if (len(self._known) + 1) * 8 * likeliest.numel() <= CACHE:
            self._known[item] = found
        return found


class AllLayers:
    """Mean over layers of the ``relative`` output error, each layer on full-precision inputs."""

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
                found = found if out["back"] is None else found @ out["back"]
                yield squared_error(found, network.target(wanted, out["norm"]), "relative") * share
                hidden = wanted


class OneLayer:
    """Output error of one layer on ``inputs`` against ``wanted``, both (windows, tokens, d), with the weights
    of ``emphasis``; errors that it trims count on the held-out windows."""

    def __init__(
        self,
        network: Network,
        held_out: int,
        index: int,
        inputs: Tensor,
        wanted: Tensor,
        error: str,
        emphasis: Emphasis | None = None,
    ):
        self.network, self.index, self.inputs, self.error = network, index, inputs, error
        self.emphasis = emphasis or Emphasis()
        self.wanted = self.emphasis.weighted(wanted)
        self.count, self.compared = divided(len(inputs), held_out)

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        energy = self.wanted[list(batch)].square().sum()
        trained = min(batch) < self.count
        for items in together(batch, self.inputs.shape[1]):
            wanted = self.wanted[items]
            share = len(items) / len(batch) if self.error == "relative" else wanted.square().sum() / energy
            found = self.network.layer(self.index, self.inputs[items], values)
            found = self.emphasis.counted(found, wanted) if trained else self.emphasis.weighted(found)
            yield squared_error(found, wanted, self.error) * share


class FourthPower:
    """Fourth moment of the folded weights over their squared second moment, averaged over the
    linears.

    This is the kurtosis about zero. The items are layers. ``sign`` -1 maximizes it.
    """

    def __init__(self, folding: Folding, sign: float = 1.0):
        self.folding, self.sign, self.count = folding, sign, folding.shape.layers
        self.compared = range(self.count)  # no tokens, so nothing is held out

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for index in batch:
            layer = self.folding.fold(index, values)
            weights = [layer.weights[linear] for linear in layer.plan.linears]
            kurtosis = torch.stack([weight.pow(4).mean() / weight.square().mean().square() for weight in weights])
            yield self.sign * kurtosis.mean() / len(batch)
