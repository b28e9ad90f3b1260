"""Statistics of rotated activations as objectives of R1 and R2, on stored tokens; the network never runs.

``kurtosis``  |κ - 1.8|, κ the kurtosis about zero; 1.8 is that of the uniform distribution (KurTail,
              arXiv 2503.01483)
``whip``      mean of exp(-|x|) (DartQuant, arXiv 2511.04063)

Every token is scaled to unit root mean square, without which the second would depend on units. Rotations
keep the norm of a token, so that both turn large channels into many of middle size. The inputs are
those of R1 (of queries, keys and values, and of gate and up) and of R2 (of o), per KV head.

The tokens are all that the calibration drew, its ``samples``. The tokens of largest norm, which every
calibration adds for ranges and outliers, are left out: a mean over a text has them in their share only.
First tokens of windows have up to an eighth of the sample (``sample_positions``), more than in whole
windows, which the publications take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..calibration.layers import DecoderFolder
from ..ground.errors import ConfigError
from ..inference.transform import Parameters, Transform, layer_state
from ..models.plans import kind_of
from .trainables import learned_kinds
from .training_context import TrainingContext

OBJECTIVES = ("kurtosis", "whip")
LEAST = 4096  # drawn tokens of a site
UNIFORM = 1.8  # kurtosis of the uniform distribution


def flatness(x: Tensor, objective: str) -> Tensor:
    """Objective of activations ``x`` (tokens, n), each token scaled to unit root mean square; tokens of
    zeros do not count."""
    power = x.square().mean(-1, keepdim=True)
    x = (x * power.clamp(min=torch.finfo(x.dtype).tiny).rsqrt())[power.squeeze(-1) > 0]
    if objective == "kurtosis":
        return (x.pow(4).mean() / x.square().mean().square() - UNIFORM).abs()
    return (-x.abs()).exp().mean()


class StoredActivations:
    """Mean over layers and sites of :func:`flatness`; the items are layers, of which none is held out.

    ``start`` is the transform whose rotations are learned. Raises :class:`ConfigError` for fewer than
    ``LEAST`` drawn tokens.
    """

    def __init__(self, start: Transform, context: TrainingContext, objective: str, device: torch.device | str):
        self.objective, self.layers = objective, []
        for index in range(DecoderFolder(context.model_folder).shape.layers):
            self.layers.append(self._samples(start, context, index, device))
        self.count, self.compared = len(self.layers), range(len(self.layers))

    def _samples(
        self, start: Transform, context: TrainingContext, index: int, device: torch.device | str
    ) -> list[tuple[str, Tensor]]:
        """(parameter that turns them, tokens (tokens, n) float32) of the sites of layer ``index``, with learned
        rotations at their start, the identity."""
        layer = layer_state(DecoderFolder(context.model_folder), index, context.statistics_file)
        start.fold_layer(layer)
        names, found = learned_kinds(start, [index]), []
        (shared,) = (name for name in learned_kinds(start) if name.split(".")[1] == "model")
        for site in layer.plan.sites:
            stream, heads = layer.plan.sites[site].stream, kind_of(site) == "output_input"
            if not (stream or heads):
                continue
            tokens = layer.statistics[site].drawn
            if len(tokens) < LEAST:
                raise ConfigError(
                    f"rotations by stored activations need {LEAST} tokens of a site, and the calibration drew "
                    f"{len(tokens)}; raise its 'samples'"
                )
            found.append((shared if stream else next(iter(names)), tokens.to(device, torch.float32)))
        return found

    def pieces(self, values: Parameters, batch: Sequence[int]) -> Iterator[Tensor]:
        for index in batch:
            for name, tokens in self.layers[index]:
                rotated = self._rotated(tokens, values[name])
                yield flatness(rotated, self.objective) / (len(batch) * len(self.layers[index]))

    def _rotated(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        if matrix.dim() == 2:
            return tokens @ matrix
        heads = tokens.unflatten(-1, (len(matrix), -1, matrix.shape[-1]))
        return torch.einsum("...gqi,gij->...gqj", heads, matrix).flatten(-3)
