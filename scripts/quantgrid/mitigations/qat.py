"""Quantization-aware fine-tuning of the transformed model, end to end: this trains weights and is not post-training quantization.

After RoSTE (arXiv 2502.09003): weights, activations, keys and values of the rotated model are rounded on the way forward, gradients pass
straight through, and what is stored at the end is the weights rounded to nearest. Ranges are found anew at every step, so that the loss is
that of the model which would be stored. Trained are the linears of the decoder layers; norms, biases and embeddings stay.
Deviations: the rotation is the transform of the cell and not chosen layer by layer while training; the loss is the divergence from the
full-precision model on the windows of calibration, where RoSTE fine-tunes on a task's data (``loss: cross_entropy`` has its form).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ..architecture import LINEARS
from ..checkpoints import load_full_precision
from ..errors import NumericalFailure
from ..learning.objectives import EndToEnd, Objective, divided
from ..learning.session import Session
from ..learning.straight_through import straight_through
from ..learning.training import Settings, descend, evaluate
from ..learning.transformed import Trained, TransformedModel
from ..quantization import Recipe
from ..quantizer import fake_quantize
from ..transforms.composition import Parameters
from ..workplace import Workplace
from .rtn import rtn

RARER_SAVES = 10  # than of other trainings: the state holds the model three times


class RoundedModel:
    """The transformed model as a function of its unrounded weights, ``{layer}.{linear}`` -> (m, n)."""

    def __init__(self, model: TransformedModel):
        self.model, self.windows, self.scheme = model, model.windows, model.recipe.schemes.weight

    def logits(self, windows: Tensor, values: Parameters) -> Tensor:
        """(batch, tokens, vocabulary)."""
        layers = range(len(self.model.layers))
        rounded = {name: straight_through(weight, fake_quantize(weight.detach(), self.scheme), self.scheme, self.model.gradient)
                   for name, weight in values.items()}
        return self.model.logits(windows, {index: {linear: rounded[f"{index}.{linear}"] for linear in LINEARS} for index in layers})


class Divergence:
    """KL divergence of the rounded model from ``teacher``, the full-precision one, averaged over tokens; the items are windows."""

    def __init__(self, network: RoundedModel, held_out: int, teacher: nn.Module):
        self.network, self.teacher = network, teacher
        self.count, self.compared = divided(len(network.windows), held_out)

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for item in batch:
            window = self.network.windows[item : item + 1]
            with torch.no_grad():
                wanted = self.teacher(window, use_cache=False).logits[0].float().log_softmax(-1)
            found = self.network.logits(window, values)[0].float().log_softmax(-1)
            yield kl_div(found, wanted, reduction="batchmean", log_target=True) / len(batch)


class Weights(nn.Module):
    """Named weights that an optimizer moves freely, at first at ``start``."""

    def __init__(self, start: Parameters):
        super().__init__()
        self.names = list(start)
        self.tensors = nn.ParameterList(tensor.clone() for tensor in start.values())

    def values(self) -> Parameters:
        return dict(zip(self.names, self.tensors))


def qat(recipe: Recipe, place: Workplace, seed: int, loss: str, steps: int, batch_size: int, schedule: str, learning_rate: float,
        weight_decay: float, held_out: int, gradient: str) -> Trained:
    """Train the weights of the model of ``place`` for ``steps`` of AdamW on batches of the windows, then round them to nearest.

    ``loss``: ``kl`` or ``cross_entropy``, of the next token. The start is kept unless the loss on the windows held out is lower at the end;
    ``ends`` of the result says so. Raises :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    model = TransformedModel(recipe, place, gradient)
    network, session = RoundedModel(model), Session(place.state, RARER_SAVES * place.save_seconds)
    objective = (EndToEnd(network, held_out) if loss == "cross_entropy"
                 else Divergence(network, held_out, load_full_precision(place.model, device=model.device)))
    start = {f"{index}.{linear}": weight[0].to(model.device) for index in range(len(model.layers))
             for linear, weight in model.weights(model.folded(index)).items()}
    settings = Settings(steps, batch_size, {"weights": learning_rate}, schedule, seed)
    kept = _trained(start, objective, settings, weight_decay, session, place)
    for index in range(len(model.layers)):
        layer = model.folded(index)
        model.store(layer, {linear: rtn(kept[f"{index}.{linear}"].cpu()[None], None, recipe.schemes.weight) for linear in LINEARS})
    return Trained(model.finished(), session.table(), session.ends)


def _trained(start: Parameters, objective: Objective, settings: Settings, weight_decay: float, session: Session, place: Workplace) -> Parameters:
    """The better of the weights at start and end, by the objective on the windows held out."""
    weights, rate = Weights(start), settings.rates["weights"]
    optimizer = torch.optim.AdamW(weights.parameters(), lr=rate, weight_decay=weight_decay)
    done, before = session.resume("all", weights, optimizer)
    before = evaluate(objective, weights.values()) if before is None else before
    for step in place.progress(range(done, settings.steps)):
        optimizer.param_groups[0]["lr"] = rate * settings.factor(step)
        optimizer.zero_grad(set_to_none=True)
        loss = descend(weights, objective, settings.batch(objective.count, step))
        if not math.isfinite(loss):
            raise NumericalFailure(f"step {step + 1} of the training of weights: the loss is not finite; lower the learning rate")
        optimizer.step()
        session.step("all", [step + 1, loss, optimizer.param_groups[0]["lr"]], before, weights, optimizer)
    learned = {name: tensor.detach() for name, tensor in weights.values().items()}
    after = evaluate(objective, learned) if settings.steps else before
    session.finish("all", {}, before, after, settings.steps > 0)
    return learned if after < before else start
