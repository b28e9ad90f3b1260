"""Perplexity and KL divergence from full precision, per window, in one layer-by-layer forward pass.

Protocol: non-overlapping windows of a fixed length; every token except the first of a window is
predicted from its predecessors in that window; natural logarithms; mean over tokens. KL(p || q)
compares the next-token distributions of the unmodified model (p) and of the quantized one (q); p
comes from stored final hidden states, so it costs one product with the lm_head and no second model.
Logits are computed for ``CHUNK`` positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..calibration.collect import advance, layer_inputs
from ..ground.errors import NumericalFailure
from ..machine.chunks import CHUNK
from ..models.lm_head import Head, head_of


@torch.no_grad()
def final_states(
    model: nn.Module, windows: Tensor, batch_size: int, progress: Callable[[Iterable], Iterable] = iter
) -> Tensor:
    """Hidden states after the final norm (windows, window, d), with dtype and device of ``model``.

    All windows pass through one decoder layer before the next; ``batch_size`` windows at a time, so
    that the arithmetic is that of the whole model. ``progress`` wraps the iteration over layers.
    """
    hidden, arguments = layer_inputs(model, windows.to(next(model.parameters()).device))
    for index, layer in zip(progress(range(len(arguments))), model.model.layers):
        advance(layer, hidden, arguments[index], batch_size)
    for rows in hidden.split(batch_size):
        rows.copy_(model.model.norm(rows))
    return hidden


def final_hidden(
    model: nn.Module, windows: Tensor, batch_size: int, progress: Callable[[Iterable], Iterable] = iter
) -> Tensor:
    """:func:`final_states` on the CPU: the reference for divergences of other models."""
    return final_states(model, windows, batch_size, progress).cpu()


def window_losses(
    hidden: Tensor, head: Head, tokens: Tensor, reference: tuple[Tensor, Head] | None = None
) -> tuple[float, float | None]:
    """(negative log-likelihood, KL to the reference) of one window, in nats per predicted token.

    ``hidden`` (window, d) with its ``head``; ``tokens`` (window,); ``reference`` the same two for the
    unmodified model.
    """
    loss, divergence = 0.0, 0.0
    predicted = len(tokens) - 1
    for start in range(0, predicted, CHUNK):
        rows = slice(start, min(start + CHUNK, predicted))
        logs = log_softmax(head(hidden[rows]).float(), -1)
        loss -= logs.gather(-1, tokens[1:][rows].unsqueeze(-1)).double().sum().item()
        if reference is not None:
            wanted = log_softmax(reference[1](reference[0][rows]).float(), -1)
            divergence += kl_div(logs, wanted, reduction="sum", log_target=True).double().item()
    return loss / predicted, None if reference is None else divergence / predicted


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    reference: Tensor,
    reference_head: Callable[[], Head],
    batch_size: int,
    progress: Callable[[Iterable], Iterable] = iter,
    first: int = 0,
) -> dict[str, list[float]]:
    """Per-window ``negative_log_likelihood`` and ``kl_divergence`` of ``model`` on ``windows``.

    ``windows`` is (count, window); ``reference`` (count, window, d) are the final hidden states of
    the unmodified model. ``reference_head`` returns its head and is called once all decoder
    layers are done. ``first`` is the number of the first window in the corpus. Raises
    :class:`NumericalFailure` if the model's output is not finite.
    """
    hidden, head = final_states(model, windows, batch_size, progress), head_of(model)
    wanted_head = reference_head().to(hidden.device, hidden.dtype)
    found: dict[str, list[float]] = {"negative_log_likelihood": [], "kl_divergence": []}
    for number, tokens in enumerate(windows.to(hidden.device)):
        wanted = reference[number].to(hidden.device, hidden.dtype)
        loss, divergence = window_losses(hidden[number], head, tokens, (wanted, wanted_head))
        if not (loss < float("inf") and divergence < float("inf")):
            raise NumericalFailure(f"perplexity: the loss of window {first + number} is NaN or infinite")
        found["negative_log_likelihood"].append(loss)
        found["kl_divergence"].append(divergence)
    return found
