"""Training loop of a transform: Adam on its parameters, jointly or layer by layer.

The objective is evaluated before and after training on held-out items. Unless it improved, the
initial parameters are kept, and the result records it. Seed and step determine the batches, so that
an interrupted training resumes with identical results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ground.errors import NumericalFailure
from ..inference.transform import Parameters, Transform, derived_seed
from ..quantizer.ranges import whole
from .network import Network
from .objectives import Objective, OneLayer
from .session import Session
from .trainables import Trainables, learned_kinds
from .training_context import TrainingContext


@dataclass(frozen=True)
class Settings:
    """Training settings.

    ``rates``: learning rate per kind of parameter (``trainables.KINDS``). ``schedule``: ``cosine``
    or ``linear``, down to zero, after a linear rise over the share ``warmup`` of the steps, at least one
    step of any share. ``checks``: measurements on held-out items, the last one at the end.
    """

    steps: int
    batch_size: int
    rates: Mapping[str, float]
    schedule: str = "cosine"
    seed: int = 0
    warmup: float = 0.0
    checks: int = 1

    def factor(self, step: int) -> float:
        """Factor of the learning rates at ``step`` (from 0)."""
        rising = max(1, whole(self.warmup, self.steps)) if self.warmup else 0
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / (self.steps - rising)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done

    def batch(self, count: int, step: int) -> list[int]:
        """Items of ``step``: a random order of all ``count`` items is used up before the next one
        starts."""
        size = min(self.batch_size, count)
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(self.seed, "batch", epoch)))
        return order[place * size : (place + 1) * size].tolist()


@dataclass
class Learned:
    """Learned transform, losses per step as CSV, and initial and final loss per part."""

    transform: Transform
    losses: str
    ends: Mapping[str, Mapping] = field(default_factory=dict)


@torch.no_grad()
def evaluate(objective: Objective, values: Parameters) -> float:
    """Objective on the held-out items."""
    return math.fsum(piece.item() for piece in objective.pieces(values, objective.compared))


def descend(trainables: Trainables, objective: Objective, batch: list[int]) -> float:
    """Accumulate the gradient of one batch and return its loss.

    Pieces accumulate in copies of the parameters; one backward pass then reaches the originals.
    """
    values = trainables.values()
    copies = {name: value.detach().requires_grad_() for name, value in values.items()}
    loss = 0.0
    for piece in objective.pieces(copies, batch):
        piece.backward()
        loss += piece.item()
    used = [name for name, copy in copies.items() if copy.grad is not None]
    torch.autograd.backward([values[name] for name in used], [copies[name].grad for name in used])
    return loss


def minimize(
    trainables: Any,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    settings: Settings,
    session: Session,
    part: str,
    progress: Callable[[Iterable], Iterable] = iter,
    after: Callable[[int], None] = lambda step: None,
) -> float:
    """Take the steps of ``settings`` that ``session`` lacks; return the held-out loss at the start.

    ``initial_lr`` of the optimizer's groups is the rate that the schedule scales. ``after`` is called with
    the number of every step that was taken. Raises
    :class:`NumericalFailure` at a loss that is not finite.
    """
    done, before = session.resume(part, trainables, optimizer)
    if before is None:
        before = evaluate(objective, trainables.values())
    for step in progress(range(done, settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * settings.factor(step)
        optimizer.zero_grad(set_to_none=True)
        loss = descend(trainables, objective, settings.batch(objective.count, step))
        if not math.isfinite(loss):
            raise NumericalFailure(
                f"training of part '{part}': the loss is not finite at step {step + 1}; lower the learning rate"
            )
        optimizer.step()
        after(step + 1)
        session.step(part, [step + 1, loss, optimizer.param_groups[0]["lr"]], before, trainables, optimizer)
    return before


class Best:
    """Parameters of the lowest held-out loss among the ``checks`` of a training.

    They are kept in ``session``, whose state an interrupted training continues from.
    """

    PREFIX, LOSS = "best.", "best_loss"

    def __init__(self, trainables: Any, objective: Objective, settings: Settings, session: Session):
        self.trainables, self.objective, self.session = trainables, objective, session
        self.due = {round(settings.steps * check / settings.checks) for check in range(1, settings.checks + 1)}

    def look(self, step: int) -> None:
        """Measure the parameters after ``step``, if it is due, and keep them if they are the best."""
        if step not in self.due:
            return
        values = {name: value.detach() for name, value in self.trainables.values().items()}
        loss, kept = evaluate(self.objective, values), self.session.finished
        if self.LOSS not in kept or not loss >= kept[self.LOSS].item():  # also where the first was NaN
            kept[self.LOSS] = torch.tensor(loss, dtype=torch.float64)
            kept |= {f"{self.PREFIX}{name}": value.clone().cpu() for name, value in values.items()}

    def taken(self) -> tuple[float, Parameters]:
        """(loss, parameters) of the best, removed from the session."""
        kept = self.session.finished
        names = [name for name in kept if name.startswith(self.PREFIX)]
        return kept.pop(self.LOSS).item(), {name.removeprefix(self.PREFIX): kept.pop(name) for name in names}


def train(
    start: Parameters,
    kinds: Mapping[str, str],
    objective: Objective,
    settings: Settings,
    session: Session,
    part: str,
    device: torch.device | str,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Parameters:
    """Minimize ``objective`` over the parameters named in ``kinds``; return the better of start and
    end.

    Results are float64. A part that an interrupted session had finished is not trained again.
    """
    if part in session.ends:
        return {name: session.finished[name] for name in kinds}
    trainables = Trainables(start, kinds, device)
    before = minimize(trainables, trainables.optimizer(settings.rates), objective, settings, session, part, progress)
    after = (
        evaluate(objective, {name: value.float().to(device) for name, value in trainables.exported().items()})
        if settings.steps
        else before
    )
    kept = trainables.exported() if after < before else {name: start[name] for name in kinds}
    session.finish(part, kept, before, after, settings.steps > 0)
    return kept


def learn_together(
    start: Transform, objective: Objective, settings: Settings, context: TrainingContext, device: torch.device | str
) -> Learned:
    """Learn all parameters with one objective."""
    session = Session.of(context)
    kept = train(start.parameters, learned_kinds(start), objective, settings, session, "all", device, context.progress)
    return _result(start, kept, session)


def learn_by_layer(
    start: Transform,
    network: Network,
    settings: Settings,
    context: TrainingContext,
    held_out: int,
    error: str,
    propagate: bool,
) -> Learned:
    """Learn layer by layer towards the full-precision output of each layer.

    Inputs are those of the full-precision model or, with ``propagate``, of the preceding rounded
    layers. The transform must not rotate the residual stream.
    """
    session = Session.of(context)
    exact = network.embedded(network.windows)
    inputs = exact.clone()
    for index in context.progress(range(len(network.layers))):
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
