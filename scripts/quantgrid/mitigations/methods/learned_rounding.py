"""Learned rounding: offsets before rounding and ranges, trained layer by layer (SignRound, AutoRound).

SignRound (arXiv 2309.05516) rounds W / s + V and trains V and the ends of each range by signed gradient
descent on the error of the layer's output, on inputs from the quantized layers before it. Defaults are
those of AutoRound: 200 steps of 8 windows, learning rate 1 / ``steps`` down to zero, so that an offset
reaches half a code distance. Deviations: its rate is 2 / ``steps`` for weights of at most 3 bits and 1000
steps or more; V counts in code distances (``learning/learned_codes.py``); the better of start and end on
held-out windows is kept, where AutoRound keeps the step with the lowest loss of its batch; a range has
one factor and, with zero points, a shift. A scale that is a power of two (MXFP4) is not trained: its
exponent is that of the scheme's ``range``, whose search weights all columns alike, where AutoRound v2
(arXiv 2512.04746) tries the exponents -1, 0 and +1 with weights E[x²]. Errors are trimmed per piece of at
most 1024 tokens or one window, there per batch, and only in training: the comparison of start and end
counts all of them. ``base: gptq`` starts from the codes of GPTQ and is ours: a weight that does not round
to its code moves into the cell of that code, halfway to its edge. Offsets are not stored: format, size
and speed are those of the base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ground.errors import ConfigError, NumericalFailure
from ...ground.storage import read_json
from ...learning.emphasis import Emphasis
from ...learning.learned_codes import RoundedWeight, in_cells
from ...learning.trainables import Bounds, SignDescent
from ...learning.training import Settings
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...models.plans import linear_key
from ...quantization.cached import Recipe
from .layer_training import Block, LayerTraining, base_of, fit_freely, rarely_saved

RATE = "offset"


def learned_rounding(
    recipe: Recipe,
    context: TrainingContext,
    seed: int,
    base: str,
    error: str,
    trim_low: float,
    trim_high: float,
    ranges: bool,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    held_out: int,
    gradient: str,
    **base_options: Any,
) -> Trained:
    """Quantize the model of ``context``; ``steps`` of signed descent per layer on batches of windows.

    ``error``: ``squared`` or ``relative`` as in ``squared_error``, ``trimmed`` without the shares
    ``trim_low`` and ``trim_high`` of every trained piece, ``fisher`` with the channels weighted by the
    sensitivities of ``context``. A layer keeps its base unless training lowers its error on the last
    ``held_out`` windows, which are not trained on.
    Raises :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    model = TransformedModel(recipe, context, gradient)
    session = rarely_saved(context)
    settings = Settings(steps, batch_size, {RATE: learning_rate}, schedule, seed)
    return LayerTraining(
        model,
        session,
        base_of(base, base_options),
        lambda weight, solved: RoundedWeight(in_cells(weight, solved), solved.quantized, ranges=ranges),
        lambda block, start, objective: fit_freely(
            str(block.index), start, objective, settings, session, SignDescent, _bounds(block)
        ),
        held_out,
        error if error == "relative" else "squared",
        _emphasis(model, context, error, trim_low, trim_high),
    ).run(context.progress)


def _emphasis(
    model: TransformedModel, context: TrainingContext, error: str, trim_low: float, trim_high: float
) -> list[Emphasis] | None:
    """Emphasis of the output error of every layer."""
    if error == "trimmed":
        return [Emphasis(trim_low=trim_low, trim_high=trim_high)] * len(model.layers)
    if error != "fisher":
        return None
    back = model.stream_back()
    return [Emphasis(channels.to(model.device), back=back) for channels in channel_weights(context)]


def channel_weights(context: TrainingContext) -> Tensor:
    """Mean squared gradients (layers, d) of the channels of layer outputs, relative to the mean of their layer;
    1 in a layer without gradients.

    Raises :class:`ConfigError` without a file of sensitivities, :class:`NumericalFailure` if they could
    not be measured.
    """
    if context.sensitivities_file is None:
        raise ConfigError("error 'fisher' weights channels by the sensitivities of the model, and no file has them")
    found = read_json(context.sensitivities_file)
    if found["status"] == "failed":
        raise NumericalFailure(found["reason"])
    squares = torch.tensor(found["channels"])
    mean = squares.mean(-1, keepdim=True)
    return torch.where(mean > 0, squares / mean, 1.0)


def _bounds(block: Block) -> dict[str, Bounds]:
    return {
        f"{linear_key(block.index, linear)}.{name}": ends
        for linear, learned in block.learned.items()
        for name, ends in learned.bounds().items()
    }
