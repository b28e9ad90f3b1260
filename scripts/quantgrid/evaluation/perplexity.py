"""Perplexity and divergence from full precision, window by window, from one forward pass.

Protocol: non-overlapping windows of a fixed length, every token but the first of a window predicted from those before it in that
window, natural logarithms, mean over tokens. KL(p || q) compares the next-token distributions of the unmodified model (p) and of
the quantized one (q); p comes from stored final hidden states, so that it costs one product with the lm_head and no second model.
Logits exist for ``CHUNK`` positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from ..errors import NumericalFailure

CHUNK = 256


@torch.no_grad()
def final_hidden(model: nn.Module, windows: Tensor, batch_size: int, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Hidden states after the final norm (windows, window, d), in the model's dtype, on the CPU."""
    device = next(model.parameters()).device
    batches = [model.model(batch.to(device), use_cache=False).last_hidden_state.cpu() for batch in progress(windows.split(batch_size))]
    return torch.cat(batches)


def window_losses(hidden: Tensor, head: Tensor, tokens: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> tuple[float, float | None]:
    """(negative log-likelihood, KL to the reference) of one window, in nats per predicted token.

    ``hidden`` (window, d) with its ``head`` (vocabulary, d); ``tokens`` (window,); ``reference`` the same two of the unmodified model.
    """
    loss, divergence = 0.0, 0.0
    predicted = len(tokens) - 1
    for start in range(0, predicted, CHUNK):
        rows = slice(start, min(start + CHUNK, predicted))
        logs = log_softmax(linear(hidden[rows], head).float(), -1)
        loss -= logs.gather(-1, tokens[1:][rows].unsqueeze(-1)).double().sum().item()
        if reference is not None:
            wanted = log_softmax(linear(reference[0][rows], reference[1]).float(), -1)
            divergence += kl_div(logs, wanted, reduction="sum", log_target=True).double().item()
    return loss / predicted, None if reference is None else divergence / predicted


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, reference: Tensor, reference_head: Tensor, batch_size: int,
             progress: Callable[[Iterable], Iterable] = iter) -> dict[str, list[float]]:
    """Per-window ``negative_log_likelihood`` and ``kl_divergence`` of ``model`` over ``windows`` (count, window).

    ``reference`` (count, window, d) are the final hidden states of the unmodified model, ``reference_head`` its lm_head. Raises
    :class:`NumericalFailure` where the model's output is not finite.
    """
    device, head = next(model.parameters()).device, model.lm_head.weight
    reference_head = reference_head.to(device, head.dtype)
    found: dict[str, list[float]] = {"negative_log_likelihood": [], "kl_divergence": []}
    for number, batch in enumerate(progress(windows.split(batch_size))):
        hidden = model.model(batch.to(device), use_cache=False).last_hidden_state
        for offset, tokens in enumerate(batch.to(device)):
            wanted = reference[number * batch_size + offset].to(device, head.dtype)
            loss, divergence = window_losses(hidden[offset], head, tokens, (wanted, reference_head))
            if not (loss < float("inf") and divergence < float("inf")):
                raise NumericalFailure(f"perplexity: window {number * batch_size + offset} has a loss that is NaN or infinite")
            found["negative_log_likelihood"].append(loss)
            found["kl_divergence"].append(divergence)
    return found
