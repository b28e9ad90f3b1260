"""Quantization-aware fine-tuning of the transformed model, end to end.

This trains weights and is not post-training quantization. ``loss: kl`` is quantization-aware
distillation (QAD, arXiv 2601.20088): the divergence from the full-precision model over the whole
vocabulary, temperature 1. ``loss: cross_entropy`` is that of RoSTE (arXiv 2502.09003), on calibration
windows instead of task data; its rotations are the transform of the cell and not chosen layer by layer.
The forward pass rounds weights, activations, keys and values, gradients pass straight through. Under
``base: rtn`` ranges are recomputed at every step and the final weights are rounded to nearest; under
``gptq`` and ``mr_gptq`` training starts at their codes and keeps their scales. Either way the loss is
that of the model that would be stored. The linears of the decoder layers are trained; norms, biases and
embeddings are not. Deviation from QAD: its ranges may be observed again after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ...inference.transform import Parameters
from ...learning.objectives import Objective, divided
from ...learning.session import Session
from ...learning.straight_weight import StraightWeight
from ...learning.trainables import Free
from ...learning.training import Best, Settings, minimize
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...models.plans import linear_key
from ...quantization.cached import Recipe
from ...quantization.checkpoints import load_full_precision
from ...quantizer.quantized_weight import Compensated
from .layer_training import base_of, rarely_saved, solved_layer


class RoundedModel:
    """Transformed model as a function of its trained weights, ``{layer}.{linear}`` -> (1, m, n)."""

    def __init__(self, model: TransformedModel, learned: Mapping[str, StraightWeight]):
        self.model, self.windows, self.learned = model, model.windows, learned

    def logits(self, windows: Tensor, values: Parameters) -> Tensor:
        """Logits (batch, tokens, vocabulary)."""
        rounded = {name: self.learned[name].rounded({"weight": weight})[0] for name, weight in values.items()}
        plans = {index: self.model.decoder.shape.plan(index) for index in range(len(self.model.layers))}
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


def qat_finetune(
    recipe: Recipe,
    context: TrainingContext,
    seed: int,
    base: str,
    loss: str,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    checks: int,
    held_out: int,
    gradient: str,
    **base_options: Any,
) -> Trained:
    """Train the weights of the model of ``context`` from the codes of ``base``, then round them.

    Training takes ``steps`` of AdamW on batches of the windows. ``loss``: ``kl``, or
    ``cross_entropy`` of the next token. The loss on the held-out windows is measured ``checks`` times;
    the best of these weights are kept, or the base if none lowers it. ``ends`` of the result records the
    decision. Raises :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    model = TransformedModel(recipe, context, gradient)
    solved, learned = _started(model, base, base_options, gradient)
    network, session = RoundedModel(model, learned), rarely_saved(context)
    objective = (
        NextToken(network, held_out)
        if loss == "cross_entropy"
        else Divergence(network, held_out, load_full_precision(context.model_folder, device=model.device))
    )
    start = {name: weight.weight for name, weight in learned.items()}
    settings = Settings(steps, batch_size, {"weights": learning_rate}, schedule, seed, warmup, checks)
    kept = _trained(start, objective, settings, weight_decay, session, context)
    for index in range(len(model.layers)):
        layer = model.folded(index)
        for linear in layer.plan.linears if kept else ():
            name = linear_key(index, linear)
            codes = learned[name].quantized({"weight": kept[name].to(model.device)})
            solved[name] = Compensated(codes, details=solved[name].details)
        model.store(layer, {linear: solved[linear_key(index, linear)] for linear in layer.plan.linears})
    return Trained(model.finished(), session.table(), session.ends)


def _started(
    model: TransformedModel, base: str, options: dict[str, Any], gradient: str
) -> tuple[dict[str, Compensated], dict[str, StraightWeight]]:
    """Weights of all linears quantized by ``base``, and the trained weights that start from them."""
    solved, learned = {}, {}
    for index in range(len(model.layers)):
        layer = model.folded(index)
        weights = model.weights(layer)
        for linear, found in solved_layer(base_of(base, options), model, layer, weights).items():
            name = linear_key(index, linear)
            solved[name] = found
            learned[name] = StraightWeight.of(weights[linear], found, base, gradient)
    return solved, learned


def _trained(
    start: Parameters,
    objective: Objective,
    settings: Settings,
    weight_decay: float,
    session: Session,
    context: TrainingContext,
) -> Parameters | None:
    """Trained weights of the lowest objective on the held-out windows, None if that is the start's."""
    weights, rate = Free(start), settings.rates["weights"]
    groups = [{"params": list(weights.parameters()), "initial_lr": rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
    best = Best(weights, objective, settings, session)
    before = minimize(weights, optimizer, objective, settings, session, "all", context.progress, best.look)
    after, learned = best.taken() if settings.steps else (before, start)
    session.finish("all", {}, before, after, settings.steps > 0)
    return learned if after < before else None
