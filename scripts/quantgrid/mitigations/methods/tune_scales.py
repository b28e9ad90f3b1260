"""Block-wise fine-tuning of scales and zero points, starting from the codes of a base.

Each decoder layer is trained to reproduce the output of the full-precision layer on full-precision
inputs. Its own inputs come from the finished layers, with activations rounded as in the cell.
Straight-through gradients reach the scales (``learning/learned_scales.py``). With base ``rtn`` the
codes follow their scales, which learns the clipping of every block as OmniQuant's LWC does (arXiv
2308.13137). The codes of ``gptq`` and ``mr_gptq`` stay fixed. Only scales and zero points are
trained, so this is post-training quantization. Deviations: EfficientQAT's block-wise phase (arXiv
2407.11062) trains the weights too, and its phase with fixed codes runs end to end; OmniQuant learns
clip ratios below 1 and no free scales; global scales, k-means codebooks and the element of a site
keep their initial values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...calibration.statistics import stack
from ...inference.transform import Parameters
from ...learning.learned_scales import ScaledWeight
from ...learning.objectives import OneLayer
from ...learning.session import Session
from ...learning.training import Settings, train
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...models.plans import linear_key
from ...quantization.cached import Recipe
from ...quantizer.quantized_weight import Compensated
from .bases import solve_base

KINDS = {"factor": "positive", "shift": "fraction"}


@dataclass(frozen=True)
class Block:
    """Decoder layer ``index`` with learned scales; the network that :class:`OneLayer` trains."""

    model: TransformedModel
    index: int
    scaled: dict[str, ScaledWeight]

    def start(self) -> Parameters:
        return {
            f"{linear_key(self.index, linear)}.{part}": tensor
            for linear, scaled in self.scaled.items()
            for part, tensor in scaled.start().items()
        }

    def of(self, linear: str, values: Parameters) -> dict[str, Tensor]:
        """Parameters of one linear among ``values``."""
        prefix = f"{linear_key(self.index, linear)}."
        return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}

    def weights(self, values: Parameters) -> dict[str, Tensor]:
        return {linear: scaled.rounded(self.of(linear, values))[0] for linear, scaled in self.scaled.items()}

    def layer(self, index: int, hidden: Tensor, values: Parameters) -> Tensor:
        return self.model.layer(index, hidden, self.weights(values))

    def output(self, hidden: Tensor, values: Parameters) -> Tensor:
        """Output of the layer for ``hidden`` (windows, tokens, d), all windows."""
        with torch.no_grad():
            return self.model.advance(self.index, hidden, self.weights(values))


def tune_scales(
    recipe: Recipe,
    context: TrainingContext,
    seed: int,
    base: str,
    error: str,
    steps: int,
    batch_size: int,
    schedule: str,
    learning_rate: float,
    held_out: int,
    gradient: str,
    **base_options: Any,
) -> Trained:
    """Quantize the model of ``context``; ``steps`` of Adam per layer on batches of windows.

    The last ``held_out`` windows are not trained on. A layer keeps its initial parameters unless
    training lowers its output error on them; ``ends`` of the result records the decision and both
    errors. Raises :class:`ConfigError` for a recipe that leaves weights in full precision.
    """
    model = TransformedModel(recipe, context, gradient)
    session = Session(context.state_file, context.save_seconds)
    settings = Settings(steps, batch_size, dict.fromkeys(KINDS.values(), learning_rate), schedule, seed)
    exact = inputs = model.embedded()
    for index in context.progress(range(len(model.layers))):
        layer, wanted = model.folded(index), model.advance(index, exact)
        weights = model.weights(layer)
        solved = _base(model, layer, weights, base, base_options)
        block = Block(
            model,
            index,
            {
                linear: ScaledWeight(weight, solved[linear].quantized, base != "rtn")
                for linear, weight in weights.items()
            },
        )
        values = _trained(block, OneLayer(block, held_out, index, inputs, wanted, error), settings, session)
        inputs = block.output(inputs, values)
        model.store(
            layer,
            {
                linear: Compensated(scaled.quantized(block.of(linear, values)), details=solved[linear].details)
                for linear, scaled in block.scaled.items()
            },
        )
        exact = wanted
    return Trained(model.finished(), session.table(), session.ends)


def _base(
    model: TransformedModel, layer: DecoderLayer, weights: dict[str, Tensor], base: str, options: dict[str, Any]
) -> dict[str, Compensated]:
    """Quantize the ``weights`` of ``layer`` by ``base`` with statistics of the full-precision
    model."""
    found: dict[str, Compensated] = {}
    for name, site in layer.plan.sites.items():
        statistics = stack([layer.statistics[name]])
        for linear in site.linears:
            found[linear] = solve_base(base, weights[linear], statistics, model.recipe.schemes.weight, **options)
    return found


def _trained(block: Block, objective: OneLayer, settings: Settings, session: Session) -> Parameters:
    """Train a layer and return its parameters; after an interruption return those already saved."""
    start, part = block.start(), str(block.index)
    if part not in session.ends:
        kinds = {name: KINDS[name.rpartition(".")[2]] for name in start}
        train(start, kinds, objective, settings, session, part, block.model.device)
    return {name: session.finished[name].to(block.model.device, torch.float32) for name in start}
