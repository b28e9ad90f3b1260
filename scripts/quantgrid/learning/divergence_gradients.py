"""Sensitivity of the model's divergence to the output channels of its layers.

Channel c of a layer's output h has the weight w_c, the mean over tokens of |∂KL / ∂h_c|, KL the divergence
from the full-precision model: the diagonal of FIMA-Q (arXiv 2506.11543), which has the gradient to the
first power. It is taken once, at weights rounded to nearest; the published code takes it several times
during the training and adds a low-rank part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from ..calibration.collect import layer_inputs
from ..models.lm_head import head_of
from ..quantizer.tensors import fake_quantize
from .transformed import TransformedModel


def divergence_gradients(model: TransformedModel) -> Tensor:
    """Mean over the tokens of ``model.windows`` of |∂KL / ∂h_c|, (layers, d) float32, relative to the mean
    of its layer.

    h is the output of a layer with all weights rounded to nearest and everything else rounded as in the
    stored model, KL the divergence of its logits from those without any rounding, averaged over tokens.
    """
    layers, scheme = range(len(model.layers)), model.recipe.schemes.weight
    weights = [
        {name: fake_quantize(weight, scheme)[0].to(model.device) for name, weight in found.items()}
        for found in (model.weights(model.folded(index)) for index in layers)
    ]
    total = torch.zeros(len(layers), model.decoder.shape.hidden_size, device=model.device)
    for window in model.windows:
        total += _gradients(model, window[None], weights)
    mean = total.mean(-1, keepdim=True)
    return torch.where(mean > 0, total / mean, 1.0)


def _gradients(model: TransformedModel, window: Tensor, weights: list[Mapping[str, Tensor]]) -> Tensor:
    """Sum over the tokens of ``window`` (1, tokens) of |∂KL / ∂h_c|, (layers, d)."""
    head, outputs = head_of(model.network), []
    with torch.no_grad():
        exact = hidden = layer_inputs(model.network, window)[0]
        for index in range(len(model.layers)):
            exact = model.layer(index, exact)
        wanted = head(model.network.model.norm(exact))[0].float().log_softmax(-1)
    hidden.requires_grad_()
    for index, rounded in enumerate(weights):
        hidden = checkpoint(model.layer, index, hidden, rounded, use_reentrant=False)
        outputs.append(hidden)
    found = head(model.network.model.norm(hidden))[0].float().log_softmax(-1)
    loss = kl_div(found, wanted, reduction="sum", log_target=True)
    return torch.stack([part.abs().sum((0, 1)).float() for part in torch.autograd.grad(loss, outputs)])
