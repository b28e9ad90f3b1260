"""Quantization-aware fine-tuning of the transformed model, end to end.

This trains weights and is not post-training quantization. After RoSTE (arXiv 2502.09003): the
forward pass rounds weights, activations, keys and values of the rotated model, gradients pass
straight through, and the final weights are rounded to nearest. Ranges are recomputed at every step,
so the loss is that of the model that would be stored. The linears of the decoder layers are
trained; norms, biases and embeddings are not. Deviations: the rotation is the transform of the cell
and is not chosen layer by layer during training; the loss is the divergence from the full-precision
model on the calibration windows, where RoSTE fine-tunes on task data (``loss: cross_entropy`` has
its form).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ...inference.transform import Parameters
from ...learning.objectives import Objective, divided
from ...learning.session import Session
from ...learning.straight_through import straight_through
from ...learning.training import Settings, evaluate, minimize
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...models.plans import linear_key
from ...quantization.cached import Recipe
from ...quantization.checkpoints import load_full_precision
from ...quantizer.tensors import fake_quantize
from .rtn import rtn

# saves are this many times rarer than in other trainings: the state is three times the model
RARER_SAVES = 10


class RoundedModel:
    """Transformed model as a function of its unrounded weights, ``{layer}.{linear}`` -> (m, n)."""

    def __init__(self, model: TransformedModel):
        self.model, self.windows, self.scheme = model, model.windows, model.recipe.schemes.weight

    def logits(self, windows: Tensor, values: Parameters) -> Tensor:
        """Logits (batch, tokens, vocabulary)."""
        layers = range(len(self.model.layers))
        rounded = {
            name: straight_through(
                weight, fake_quantize(weight.detach(), self.scheme), self.scheme, self.model.gradient
            )
            for name, weight in values.items()
        }
        plans = {index: self.model.decoder.shape.plan(index) for index in layers}
        weights = {
            index: {linear: rounded[linear_key(index, linear)] for linear in plan.linears}
            for index, plan in plans.items()
        }
        return self.model.logits(windows, weights)


class Divergence:
    """KL divergence from ``teacher``, the full-precision model, averaged over tokens; items are
    windows."""

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


class NextToken:
    """Cross-entropy of the next token, averaged over tokens; items are windows."""

    def __init__(self, network: RoundedModel, held_out: int):
        self.network = network
        self.count, self.compared = divided(len(network.windows), held_out)

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for item in batch:
            window = self.network.windows[item : item + 1]
            yield cross_entropy(self.network.logits(window, values)[0, :-1].float(), window[0, 1:]) / len(batch)


class Weights(nn.Module):
    """Named trainable weights without constraints, initialized to ``start``."""

    def __init__(self, start: Parameters):
        super().__init__()
        self.names = list(start)
        self.tensors = nn.ParameterList(tensor.clone() for tensor in start.values())

    def values(self) -> Parameters:
        return dict(zip(self.names, self.tensors))


def qat_finetune(
    recipe: Recipe,
    context: TrainingContext,
    seed: int,
    loss: str,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    weight_decay: float,
    held_out: int,
    gradient: str,
) -> Trained:
    """Train the weights of the model of ``context``, then round them to nearest.

    Training takes ``steps`` of AdamW on batches of the windows. ``loss``: ``kl``, or
    ``cross_entropy`` of the next token. The initial weights are kept unless training lowers the
    loss on the held-out windows; ``ends`` of the result records the decision. Raises
    :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    model = TransformedModel(recipe, context, gradient)
    network, session = RoundedModel(model), Session(context.state_file, RARER_SAVES * context.save_seconds)
    objective = (
        NextToken(network, held_out)
        if loss == "cross_entropy"
        else Divergence(network, held_out, load_full_precision(context.model_folder, device=model.device))
    )
    start = {
        linear_key(index, linear): weight[0]
        for index in range(len(model.layers))
        for linear, weight in model.weights(model.folded(index)).items()
    }
    settings = Settings(steps, batch_size, {"weights": learning_rate}, schedule, seed)
    kept = _trained(start, objective, settings, weight_decay, session, context)
    for index in range(len(model.layers)):
        layer = model.folded(index)
        weights = {linear: kept[linear_key(index, linear)][None] for linear in layer.plan.linears}
        model.store(layer, {linear: rtn(weight, None, recipe.schemes.weight) for linear, weight in weights.items()})
    return Trained(model.finished(), session.table(), session.ends)


def _trained(
    start: Parameters,
    objective: Objective,
    settings: Settings,
    weight_decay: float,
    session: Session,
    context: TrainingContext,
) -> Parameters:
    """Initial or trained weights, whichever have the lower objective on the held-out windows."""
    weights, rate = Weights(start), settings.rates["weights"]
    groups = [{"params": list(weights.parameters()), "initial_lr": rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
    before = minimize(weights, optimizer, objective, settings, session, "all", context.progress)
    learned = {name: tensor.detach() for name, tensor in weights.values().items()}
    after = evaluate(objective, learned) if settings.steps else before
    session.finish("all", {}, before, after, settings.steps > 0)
    return learned if after < before else start
