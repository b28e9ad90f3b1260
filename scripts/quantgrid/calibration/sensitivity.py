"""Sensitivities of linears and of the channels of layer outputs: mean squared gradients, layer by layer.

A small error e of the outputs y of one linear raises KL(p || q) per token by E[(g · e)²] / 2, where g is
the gradient of the summed negative log-likelihood of tokens drawn from the model's own distribution p
(the Fisher information; Amari, Neural Computation, 1998). With one scalar per linear, E‖g‖²/m for m
outputs, that is E‖g‖²/m · E‖e‖² / 2: the output error of a quantized linear in nats per token. At the
output of a layer, E[g_c²] of every channel is the diagonal of the Fisher information, which weights the
errors of a layer that is trained (``learning/emphasis.py``).

The windows pass forward through one decoder layer at a time, with the inputs of all layers kept, and
back from the last layer, each of which runs again. Two layers' worth of memory never coincide; windows
whose inputs exceed ``HELD`` bytes follow one another, and every sweep loads all layers twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..ground.errors import ConfigError, NumericalFailure
from ..machine.chunks import CHUNK, HELD
from ..models.canonical import routed_rows, shape_of
from ..models.lm_head import Head, head_of
from ..models.plans import LayerPlan, linear_key
from .collect import advance, layer_inputs


@dataclass
class Sensitivity:
    """Sums of one linear over the tokens that it reads: ``count`` tokens, squared gradients of its
    output and squared outputs without bias, both summed over channels."""

    outputs: int
    count: int = 0
    gradients: float = 0.0
    squares: float = 0.0

    def to_dict(self, tokens: int) -> dict[str, float]:
        """``gradient_square`` E‖g‖²/m, ``output_square`` E‖y‖² over its tokens, and its ``share`` of all ``tokens``."""
        count = max(1, self.count)
        return {
            "gradient_square": self.gradients / count / self.outputs,
            "output_square": self.squares / count,
            "share": self.count / tokens,
        }


@dataclass(frozen=True)
class Sensitivities:
    """Sensitivities of a model: ``linears`` by name (``0.q``; :meth:`Sensitivity.to_dict`), and ``channels``
    (layers, d) float64, the mean squared gradient of every channel of a layer's output."""

    linears: dict[str, dict[str, float]]
    channels: Tensor


def measure_sensitivities(
    model: nn.Module,
    windows: Tensor,
    seed: int = 0,
    skip_first: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    held: int = HELD,
) -> Sensitivities:
    """Sensitivities of the linears and layers of a transformers decoder.

    ``windows`` (count, tokens) of token ids; ``seed`` draws the predicted tokens. The first
    ``skip_first`` tokens of every window are context only. ``held`` bytes of layer inputs are in memory
    at a time, the result does not depend on it. Raises :class:`NumericalFailure` if a sum is not finite.
    """
    if skip_first >= windows.shape[1]:
        raise ConfigError(f"skip_first {skip_first} leaves no tokens of windows of {windows.shape[1]} tokens")
    shape, head = shape_of(model), head_of(model)
    plans = [shape.plan(index) for index in range(shape.layers)]
    found = {
        linear_key(index, linear): Sensitivity(shape.linear_size(linear)[0])
        for index, plan in enumerate(plans)
        for linear in plan.linears
    }
    channels = torch.zeros(shape.layers, shape.hidden_size, dtype=torch.float64)
    generator, one = torch.Generator().manual_seed(seed), 4 * shape.layers * windows.shape[1] * shape.hidden_size
    device = next(model.parameters()).device
    sweeps = windows.to(device).split(max(1, held // one))
    steps = iter(progress(range(2 * shape.layers * len(sweeps))))
    for tokens in sweeps:
        inputs, last, arguments = _forward(model, tokens, steps)
        gradient = _label_gradients(model, head, last, generator)
        for index, layer in zip(reversed(range(shape.layers)), reversed(model.model.layers)):
            next(steps, None)
            for window in gradient:
                channels[index] += window[skip_first:].square().sum(0, dtype=torch.float64).cpu()
            with _observed(layer, plans[index], index, found, skip_first):
                _backward(layer, inputs.pop(), gradient, arguments[index])
    seen = len(windows) * (windows.shape[1] - skip_first)
    sums = torch.tensor([part for held in found.values() for part in (held.gradients, held.squares)])
    if not (sums.isfinite().all() and channels.isfinite().all()):
        raise NumericalFailure("sensitivities: a gradient or an output is NaN or infinite")
    return Sensitivities({name: held.to_dict(seen) for name, held in found.items()}, channels / seen)


@torch.no_grad()
def _forward(
    model: nn.Module, tokens: Tensor, steps: Iterator[int]
) -> tuple[list[Tensor], Tensor, list[dict[str, Any]]]:
    """Inputs (windows, tokens, d) of every layer, outputs of the last, and keyword arguments per layer."""
    hidden, arguments = layer_inputs(model, tokens)
    inputs = []
    for index, layer in enumerate(model.model.layers):
        next(steps, None)
        inputs.append(hidden.clone())
        advance(layer, hidden, arguments[index])
    return inputs, hidden, arguments


def _label_gradients(model: nn.Module, head: Head, last: Tensor, generator: torch.Generator) -> Tensor:
    """Gradients (windows, tokens, d) at the outputs of the last layer of the summed loss of tokens drawn
    from the model's distribution."""
    found = torch.empty_like(last)
    for row, hidden in enumerate(last):
        before = hidden.detach().requires_grad_()
        states = model.model.norm(before)
        parts = [_head_gradient(head, part, generator) for part in states.detach().split(CHUNK)]
        (found[row],) = torch.autograd.grad(states, before, torch.cat(parts))
    return found


def _head_gradient(head: Head, states: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at ``states`` (tokens, d) of the summed loss of tokens drawn from their own logits."""
    states = states.requires_grad_()
    logits = head(states).float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
    (found,) = torch.autograd.grad(cross_entropy(logits, drawn.to(logits.device), reduction="sum"), states)
    return found


def _backward(layer: nn.Module, inputs: Tensor, gradient: Tensor, arguments: Mapping[str, Any]) -> None:
    """Replace gradients (windows, tokens, d) at layer outputs by those at the ``inputs``, window by window."""
    layer.requires_grad_(False)
    for row, hidden in enumerate(inputs.split(1)):
        before = hidden.detach().requires_grad_()
        output = layer(before, **arguments)
        output = output[0] if isinstance(output, tuple) else output
        (gradient[row : row + 1],) = torch.autograd.grad(output, before, gradient[row : row + 1])


@contextmanager
def _observed(
    layer: nn.Module, plan: LayerPlan, index: int, found: Mapping[str, Sensitivity], skip_first: int
) -> Iterator[None]:
    """Add the outputs and gradients of every linear of ``layer`` to ``found`` while windows pass one by one."""
    chosen: list[Tensor] = []
    handles = []
    if plan.expert_sites:
        experts = layer.get_submodule(plan.sites["mlp_input"].block).experts
        handles.append(experts.register_forward_pre_hook(lambda _module, inputs: chosen.append(inputs[1])))
    routed = {linear for site in plan.expert_sites for linear in _of_expert(site)}
    for linear in plan.linears:
        number = int(linear.partition(".")[2]) if linear in routed else None

        def look(module: nn.Linear, _inputs: Any, output: Tensor, linear: str = linear, number: int | None = number):
            tokens = (
                torch.arange(output.shape[:-1].numel(), device=output.device)
                if number is None
                else routed_rows(chosen[-1], number)[1]
            )
            _add(found[linear_key(index, linear)], module, output, tokens >= skip_first)

        handles.append(layer.get_submodule(plan.modules[linear]).register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_expert(site: str) -> tuple[str, ...]:
    """Linears of the routed expert whose down projection reads ``site``."""
    number = site.partition(".")[2]
    return tuple(f"{kind}.{number}" for kind in ("gate", "up", "down"))


def _add(found: Sensitivity, module: nn.Linear, output: Tensor, kept: Tensor) -> None:
    """Add the ``kept`` rows of an ``output`` (*batch, m), and later those of its gradient, to ``found``."""

    def total(rows: Tensor) -> float:
        return rows.reshape(-1, rows.shape[-1])[kept].double().square().sum().item()

    def backward(gradient: Tensor) -> None:
        found.gradients += total(gradient)

    plain = output.detach() if module.bias is None else output.detach() - module.bias
    found.count += int(kept.sum())
    found.squares += total(plain)
    output.register_hook(backward)
