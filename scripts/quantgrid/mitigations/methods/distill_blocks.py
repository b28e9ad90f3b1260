"""Block-wise distillation: the weights of one layer after the other, trained on its full-precision output.

This trains weights and is not post-training quantization. It is the block-wise form of quantization-aware
distillation (QAD, arXiv 2601.20088) as llm-compressor has it: targets are the outputs of the
full-precision layers, inputs those of the quantized layers before, weights are rounded in the forward
pass with straight-through gradients (``learning/straight_weight.py``). Deviations: the number of steps is
given, not of epochs; ranges are recomputed at every step, or those of ``base: gptq`` and ``mr_gptq``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...learning.straight_weight import StraightWeight
from ...learning.training import Settings
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...quantization.cached import Recipe
from .layer_training import LayerTraining, base_of, fit_freely, rarely_saved

RATE = "weights"


def distill_blocks(
    recipe: Recipe,
    context: TrainingContext,
    seed: int,
    base: str,
    error: str,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    held_out: int,
    gradient: str,
    **base_options: Any,
) -> Trained:
    """Quantize the model of ``context``; ``steps`` of AdamW per layer on batches of windows.

    A layer keeps its base unless training lowers its output error on the last ``held_out`` windows, which
    are not trained on. Raises :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    session = rarely_saved(context)
    settings = Settings(steps, batch_size, {RATE: learning_rate}, schedule, seed, warmup)
    optimizer = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay)
    return LayerTraining(
        TransformedModel(recipe, context, gradient),
        session,
        base_of(base, base_options),
        lambda weight, solved: StraightWeight.of(weight, solved, base, gradient),
        lambda block, start, objective: fit_freely(str(block.index), start, objective, settings, session, optimizer),
        held_out,
        error,
    ).run(context.progress)
