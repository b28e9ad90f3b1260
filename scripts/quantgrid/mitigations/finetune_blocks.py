"""Scales and zero points fine-tuned decoder layer by decoder layer, after the codes of a base are there.

Every layer is trained to give, on inputs from the already finished layers and with activations rounded as in the cell, what the full-precision
layer gives on full-precision inputs; straight-through gradients reach the scales (``learning/learned_scales.py``). With base ``rtn`` codes
follow their scales, which is to learn the clipping of every block, as OmniQuant's LWC does (arXiv 2308.13137); the codes of ``gptq`` and
``mr_gptq`` stay fixed. Nothing of the model but scales and zero points is trained, so that it stays post-training quantization.
Deviations: EfficientQAT's block-wise phase (arXiv 2407.11062) trains the weights too and its phase with fixed codes runs end to end; OmniQuant
has clip ratios below 1 and no scales of its own; global scales, k-means codebooks and the element of a site stay those of the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architecture import SITE_OF
from ..decoders import DecoderLayer
from ..learning.learned_scales import ScaledWeight, moved
from ..learning.objectives import OneLayer
from ..learning.session import Session
from ..learning.training import Settings, train
from ..learning.transformed import Trained, TransformedModel
from ..quantization import Recipe
from ..statistics import stack
from ..transforms.composition import Parameters
from ..workplace import Workplace
from .bases import solve_base
from .compensated import Compensated

KINDS = {"factor": "positive", "shift": "fraction"}


@dataclass(frozen=True)
class Block:
    """Decoder layer ``index`` with learned scales: what :class:`OneLayer` asks of a network, for this layer alone."""

    model: TransformedModel
    index: int
    scaled: dict[str, ScaledWeight]

    def start(self) -> Parameters:
        return {f"{self.index}.{linear}.{part}": tensor for linear, scaled in self.scaled.items() for part, tensor in scaled.start().items()}

    def of(self, linear: str, values: Parameters) -> dict[str, Tensor]:
        """The parameters of one linear among ``values``."""
        prefix = f"{self.index}.{linear}."
        return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}

    def weights(self, values: Parameters) -> dict[str, Tensor]:
        return {linear: scaled.rounded(self.of(linear, values))[0] for linear, scaled in self.scaled.items()}

    def layer(self, index: int, hidden: Tensor, values: Parameters) -> Tensor:
        return self.model.layer(index, hidden, self.weights(values))

    def output(self, hidden: Tensor, values: Parameters) -> Tensor:
        """``hidden`` (windows, tokens, d) of all windows after the layer."""
        with torch.no_grad():
            return self.model.advance(self.index, hidden, self.weights(values))


def finetune_blocks(recipe: Recipe, place: Workplace, seed: int, base: str, error: str, steps: int, batch_size: int, schedule: str,
                    learning_rate: float, held_out: int, gradient: str, **base_options: Any) -> Trained:
    """Quantize the model of ``place``; ``steps`` of Adam for each layer on batches of the windows.

    A layer keeps its start unless the error of its output over the ``held_out`` last windows, which are not trained on, is lower after the
    training; ``ends`` of the result says which, and both errors. Raises :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    model = TransformedModel(recipe, place, gradient)
    session = Session(place.state, place.save_seconds)
    settings = Settings(steps, batch_size, dict.fromkeys(KINDS.values(), learning_rate), schedule, seed)
    exact = inputs = model.embedded()
    for index in place.progress(range(len(model.layers))):
        layer, wanted = model.folded(index), model.advance(index, exact)
        weights = model.weights(layer)
        solved = _base(model, layer, weights, base, base_options)
        block = Block(model, index, {linear: ScaledWeight(weight.to(model.device), moved(solved[linear].quantized, model.device), base != "rtn")
                                     for linear, weight in weights.items()})
        values = _trained(block, OneLayer(block, held_out, index, inputs, wanted, error), settings, session)
        inputs = block.output(inputs, values)
        model.store(layer, {linear: Compensated(moved(scaled.quantized(block.of(linear, values)), "cpu"), details=solved[linear].details)
                            for linear, scaled in block.scaled.items()})
        exact = wanted
    return Trained(model.finished(), session.table(), session.ends)


def _base(model: TransformedModel, layer: DecoderLayer, weights: dict[str, Tensor], base: str, options: dict[str, Any]) -> dict[str, Compensated]:
    """The ``weights`` of ``layer`` by ``base``, on the statistics of the full-precision model."""
    statistics = {site: stack([found]) for site, found in layer.statistics.items()}
    return {linear: solve_base(base, weight, statistics[SITE_OF[linear]], model.recipe.schemes.weight, **options)
            for linear, weight in weights.items()}


def _trained(block: Block, objective: OneLayer, settings: Settings, session: Session) -> Parameters:
    """The parameters of a layer after its training; of one that was trained before an interruption what it kept then."""
    start, part = block.start(), str(block.index)
    if part not in session.ends:
        kinds = {name: KINDS[name.rpartition(".")[2]] for name in start}
        train(start, kinds, objective, settings, session, part, block.model.device)
    return {name: session.finished[name].to(block.model.device, torch.float32) for name in start}
