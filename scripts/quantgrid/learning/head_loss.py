"""Loss at the lm_head, computed for some positions at a time to save memory for logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..machine.chunks import CHUNK
from ..models.lm_head import Head


class _Divergence(torch.autograd.Function):
    """:func:`divergence`; the forward pass computes the gradient from the same logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, likeliest: Tensor, where: Tensor) -> Tensor:
        loss, gradients = hidden.new_zeros(()), []
        for part, wanted, tokens in zip(hidden.split(CHUNK), likeliest.split(CHUNK), where.split(CHUNK)):
            logits, share = head(part), wanted.exp()
            # derivative of a logit with respect to the product with lm_head
            slope = head.scale if head.softcap is None else head.scale * (1 - (logits / head.softcap).square())
            peak = logits.amax(-1, keepdim=True)
            student = logits.gather(-1, tokens) - peak
            exponentials = logits.sub_(peak).exp_()
            total = exponentials.sum(-1, keepdim=True)
            loss += (share * (wanted - student + total.log())).sum()
            if ctx.needs_input_grad[0]:
                by_logits = exponentials.mul_(share.sum(-1, keepdim=True) / total).scatter_add_(-1, tokens, -share)
                gradients.append(by_logits.mul_(slope) @ head.weight / len(hidden))
        ctx.save_for_backward(*gradients)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.cat(ctx.saved_tensors) * gradient, None, None, None


def divergence(hidden: Tensor, head: Head, likeliest: Tensor, where: Tensor) -> Tensor:
    """Mean over positions of sum_k p_k (log p_k - log q_k), differentiable in ``hidden``.

    q is the softmax over the vocabulary of ``head`` applied to ``hidden`` (positions, d). ``likeliest``
    (positions, k) holds log p, ``where`` the tokens. With
    k = 1 and log p = 0 it is the cross-entropy.
    """
    return _Divergence.apply(hidden, head, likeliest, where)
