"""The training of a transform: Adam on the free form of its parameters, all at once or layer after layer, never worse than its start.

The objective is evaluated before and after on items that no batch holds; where the end is not better, the start is kept and the result says so.
Batches are drawn by seed and step, so that a training which was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import NumericalFailure
from ..transforms.composition import Parameters, Transform, derived_seed
from ..workplace import Workplace
from .network import Network
from .objectives import Objective, OneLayer
from .session import Session
from .trainables import Trainables, learned_kinds


@dataclass(frozen=True)
class Settings:
    """``rates``: learning rate per kind of parameter (``trainables.KINDS``); ``schedule``: ``cosine`` or ``linear``, down to zero."""

    steps: int
    batch_size: int
    rates: Mapping[str, float]
    schedule: str = "cosine"
    seed: int = 0

    def factor(self, step: int) -> float:
        """Of the learning rates at ``step`` (from 0)."""
        done = step / self.steps
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done

    def batch(self, count: int, step: int) -> list[int]:
        """Items of ``step``: all ``count`` of them in an order of their own before any comes again."""
        size = min(self.batch_size, count)
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(self.seed, "batch", epoch)))
        return order[place * size : (place + 1) * size].tolist()


@dataclass
class Learned:
    """A learned transform, the losses of its steps as CSV, and per part its loss before and after."""

    transform: Transform
    losses: str
    ends: Mapping[str, Mapping] = field(default_factory=dict)


@torch.no_grad()
def evaluate(objective: Objective, values: Parameters) -> float:
    """The objective on the items that are held out of the training."""
    return math.fsum(piece.item() for piece in objective.pieces(values, objective.compared))


def descend(trainables: Trainables, objective: Objective, batch: list[int]) -> float:
    """Add the gradient of one batch; returns its loss. Pieces meet in copies of the parameters, which are sent back once."""
    values = trainables.values()
    copies = {name: value.detach().requires_grad_() for name, value in values.items()}
    loss = 0.0
    for piece in objective.pieces(copies, batch):
        piece.backward()
        loss += piece.item()
    used = [name for name, copy in copies.items() if copy.grad is not None]
    torch.autograd.backward([values[name] for name in used], [copies[name].grad for name in used])
    return loss


def train(start: Parameters, kinds: Mapping[str, str], objective: Objective, settings: Settings, session: Session, part: str,
          device: torch.device | str, progress: Callable[[Iterable], Iterable] = iter) -> Parameters:
    """Minimize ``objective`` over the parameters named in ``kinds``; the better of start and end, in float64.

    A part that an interrupted session had finished is what it left.
    """
    if part in session.ends:
        return {name: session.finished[name] for name in kinds}
    trainables = Trainables(start, kinds, device)
    optimizer = trainables.optimizer(settings.rates)
    done, before = session.resume(part, trainables, optimizer)
    if before is None:
        before = evaluate(objective, trainables.values())
    for step in progress(range(done, settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * settings.factor(step)
        optimizer.zero_grad(set_to_none=True)
        loss = descend(trainables, objective, settings.batch(objective.count, step))
        if not math.isfinite(loss):
            raise NumericalFailure(f"training step {step + 1} of part '{part}': the loss is not finite; lower the learning rate")
        optimizer.step()
        session.step(part, [step + 1, loss, optimizer.param_groups[0]["lr"]], before, trainables, optimizer)
    after = evaluate(objective, {name: value.float().to(device) for name, value in trainables.exported().items()}) if settings.steps else before
    kept = trainables.exported() if after < before else {name: start[name] for name in kinds}
    session.finish(part, kept, before, after, settings.steps > 0)
    return kept


def learn_together(start: Transform, objective: Objective, settings: Settings, place: Workplace, device: torch.device | str) -> Learned:
    """All learned parameters against one objective."""
    session = Session(place.state, place.save_seconds)
    kept = train(start.parameters, learned_kinds(start), objective, settings, session, "all", device, place.progress)
    return _result(start, kept, session)


def learn_by_layer(start: Transform, network: Network, settings: Settings, place: Workplace, held_out: int, error: str,
                   propagate: bool) -> Learned:
    """Layer after layer against its full-precision output, on full-precision inputs or, with ``propagate``, on what the rounded layers
    before it give. Needs a transform that leaves the residual stream in its basis."""
    session = Session(place.state, place.save_seconds)
    exact = network.embedded(network.windows)
    inputs = exact.clone()
    for index in place.progress(range(len(network.layers))):
        wanted = torch.cat([network.full_precision_layer(index, window[None]) for window in exact])
        kinds = learned_kinds(start, [index])
        if str(index) not in session.ends:
            objective = OneLayer(network, held_out, index, inputs, wanted, error)
            train(start.parameters, kinds, objective, settings, session, str(index), network.device)
        if propagate:
            values = {name: session.finished[name].to(network.device, torch.float32) for name in kinds}
            with torch.no_grad():
                inputs = torch.cat([network.layer(index, window[None], values) for window in inputs])
        else:
            inputs = wanted
        exact = wanted
    return _result(start, session.finished, session)


def _result(start: Transform, kept: Parameters, session: Session) -> Learned:
    return Learned(Transform(start.primitives, {**start.parameters, **kept}), session.table(), session.ends)
