"""Block-wise fine-tuning of scales and zero points, starting from the codes of a base.

Each decoder layer is trained to reproduce the full-precision one (``layer_training.py``).
Straight-through gradients reach the scales (``learning/learned_scales.py``). With base ``rtn`` the
codes follow their scales, which learns the clipping of every block as OmniQuant's LWC does (arXiv
2308.13137). The codes of ``gptq`` and ``mr_gptq`` stay fixed. Only scales and zero points are
trained, so this is post-training quantization. Deviations: EfficientQAT's block-wise phase (arXiv
2407.11062) trains the weights too, and its phase with fixed codes runs end to end; OmniQuant learns
clip ratios below 1 and no free scales; global scales, k-means codebooks and the element of a site
keep their initial values.
"""

from __future__ import annotations

from typing import Any

from ...inference.transform import Parameters
from ...learning.learned_scales import ScaledWeight
from ...learning.session import Session
from ...learning.training import Settings, train
from ...learning.training_context import TrainingContext
from ...learning.transformed import Trained, TransformedModel
from ...quantization.cached import Recipe
from .layer_training import LayerTraining, base_of

KINDS = {"factor": "positive", "shift": "fraction"}


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
    session = Session.of(context)
    settings = Settings(steps, batch_size, dict.fromkeys(KINDS.values(), learning_rate), schedule, seed)
    return LayerTraining(
        TransformedModel(recipe, context, gradient),
        session,
        base_of(base, base_options),
        lambda weight, solved: ScaledWeight(weight, solved.quantized, base != "rtn"),
        lambda block, start, objective: train(
            start, _kinds(start), objective, settings, session, str(block.index), block.model.device
        ),
        held_out,
        error,
    ).run(context.progress)


def _kinds(start: Parameters) -> dict[str, str]:
    return {name: KINDS[name.rpartition(".")[2]] for name in start}
