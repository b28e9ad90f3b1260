"""Training of the rounding of one decoder layer after the other, from the codes of a base.

Each layer is trained to reproduce the output of the full-precision layer on full-precision inputs. Its
own inputs come from the finished layers, with activations rounded as in the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...calibration.statistics import stack
from ...inference.transform import Parameters
from ...learning.emphasis import Emphasis
from ...learning.objectives import OneLayer
from ...learning.session import Session
from ...learning.trainables import Bounds, Free
from ...learning.training import Settings, evaluate, minimize
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...models.plans import linear_key
from ...quantizer.quantized_weight import Compensated
from ...quantizer.tensors import QuantizedTensor
from .bases import solve_base

RARER_SAVES = 10  # than in other trainings


class LearnedWeight(Protocol):
    """Rounded weight (*batch, m, n) as a function of learned parameters."""

    def start(self) -> dict[str, Tensor]:
        """Initial parameters."""

    def rounded(self, values: dict[str, Tensor]) -> Tensor:
        """Rounded weight (*batch, m, n) under ``values``, differentiable with respect to them."""

    def quantized(self, values: dict[str, Tensor]) -> QuantizedTensor:
        """Quantized tensor of the values of :meth:`rounded`."""


@dataclass(frozen=True)
class Block:
    """Decoder layer ``index`` with learned weights; the network that :class:`OneLayer` trains."""

    model: TransformedModel
    index: int
    learned: dict[str, LearnedWeight]

    def start(self) -> Parameters:
        return {
            f"{linear_key(self.index, linear)}.{part}": tensor
            for linear, learned in self.learned.items()
            for part, tensor in learned.start().items()
        }

    def of(self, linear: str, values: Parameters) -> dict[str, Tensor]:
        """Parameters of one linear among ``values``."""
        prefix = f"{linear_key(self.index, linear)}."
        return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}

    def weights(self, values: Parameters) -> dict[str, Tensor]:
        return {linear: learned.rounded(self.of(linear, values))[0] for linear, learned in self.learned.items()}

    def layer(self, index: int, hidden: Tensor, values: Parameters) -> Tensor:
        return self.model.layer(index, hidden, self.weights(values))

    def output(self, hidden: Tensor, values: Parameters) -> Tensor:
        """Output of the layer for ``hidden`` (windows, tokens, d), all windows."""
        with torch.no_grad():
            return self.model.advance(self.index, hidden, self.weights(values))


@dataclass(frozen=True)
class LayerTraining:
    """Training of all layers of ``model`` from the codes of ``base``, solved with the cached statistics of
    the full-precision model.

    ``learned`` makes the learned weight of a weight (1, m, n) and its base, ``fit`` trains a block from its
    initial parameters and leaves the better ones in ``session``. The last ``held_out`` windows are not
    trained on. ``error`` is that of ``squared_error``, ``emphasis`` that of every layer, or none.
    """

    model: TransformedModel
    session: Session
    base: Callable[..., Compensated]
    learned: Callable[[Tensor, Compensated], LearnedWeight]
    fit: Callable[[Block, Parameters, OneLayer], object]
    held_out: int
    error: str
    emphasis: list[Emphasis] | None = None

    def run(self, progress: Callable[[Iterable], Iterable] = iter) -> Trained:
        """Train the layers and store each as it ends; a layer whose start is kept is stored as its base."""
        model = self.model
        exact = inputs = model.embedded()
        for index in progress(range(len(model.layers))):
            layer, wanted = model.folded(index), model.advance(index, exact)
            weights = model.weights(layer)
            solved = solved_layer(self.base, model, layer, weights)
            block = Block(
                model,
                index,
                {linear: self.learned(weight, solved[linear]) for linear, weight in weights.items()},
            )
            emphasis = self.emphasis[index] if self.emphasis else None
            values = self._fitted(block, OneLayer(block, self.held_out, index, inputs, wanted, self.error, emphasis))
            inputs = block.output(inputs, values)
            if self.session.ends[str(index)]["kept"] == "learned":
                solved = {
                    linear: Compensated(learned.quantized(block.of(linear, values)), details=solved[linear].details)
                    for linear, learned in block.learned.items()
                }
            model.store(layer, solved)
            exact = wanted
        return Trained(model.finished(), self.session.table(), self.session.ends)

    def _fitted(self, block: Block, objective: OneLayer) -> Parameters:
        """Parameters (float32) of ``block``, trained unless an interrupted session had finished it."""
        start = block.start()
        if str(block.index) not in self.session.ends:
            self.fit(block, start, objective)
        finished = self.session.finished
        return {name: finished[name].to(self.model.device, torch.float32) for name in start}


def rarely_saved(context: TrainingContext) -> Session:
    """Session of a training whose state has tensors of the size of the weights."""
    return Session.of(context, RARER_SAVES)


def fit_freely(
    part: str,
    start: Parameters,
    objective: OneLayer,
    settings: Settings,
    session: Session,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    bounds: Mapping[str, Bounds] | None = None,
) -> None:
    """Train ``start`` itself with ``optimizer`` of its groups at the one rate of ``settings``, within
    ``bounds``; ``session`` keeps the better of start and end."""
    [rate] = settings.rates.values()
    free = Free(start, bounds)
    steps = optimizer([{"params": list(free.parameters()), "initial_lr": rate}])
    steps.register_step_post_hook(lambda *_: free.confine())
    before = minimize(free, steps, objective, settings, session, part)
    learned = {name: tensor.detach() for name, tensor in free.values().items()}
    after = evaluate(objective, learned) if settings.steps else before
    kept = learned if after < before else start
    session.finish(part, {name: tensor.cpu() for name, tensor in kept.items()}, before, after, settings.steps > 0)


def solved_layer(
    base: Callable[..., Compensated], model: TransformedModel, layer: DecoderLayer, weights: dict[str, Tensor]
) -> dict[str, Compensated]:
    """``weights`` (1, m, n) of ``layer`` quantized by ``base``, by linear."""
    found: dict[str, Compensated] = {}
    for name, site in layer.plan.sites.items():
        statistics = stack([layer.statistics[name]])
        for linear in site.linears:
            found[linear] = base(weights[linear], statistics, model.recipe.schemes.weight)
    return found


def base_of(name: str, options: dict) -> Callable[..., Compensated]:
    """:func:`solve_base` for one base and its options."""
    return lambda weight, statistics, scheme: solve_base(name, weight, statistics, scheme, **options)
