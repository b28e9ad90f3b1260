"""Rounding between a map and its inverse, loss at the lm_head: against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quantgrid.inference.input_maps import BlockMap
from quantgrid.learning import head_loss
from quantgrid.learning.head_loss import divergence
from quantgrid.learning.mapped import rounded_between
from quantgrid.learning.straight_through import StraightThrough
from quantgrid.linalg.hadamard import random_orthogonal
from quantgrid.models.lm_head import Head
from quantgrid.schemes import activation_scheme
from reference_statistics import close

RANGES = {
    "int4 per token": activation_scheme("int4"),
    "symmetric per token": activation_scheme("int4_sym"),
    "groups": activation_scheme("int4", granularity="group-16"),
    "tensor": activation_scheme("int4", granularity="tensor"),
    "mxfp4": activation_scheme("mxfp4"),
    "nvfp4": activation_scheme("nvfp4"),
}
BLOCKS = {"whole": (1, 64), "heads": (2, 16)}  # blocks and width of each, of 64 channels


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blockwise(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply ``x`` by the block-diagonal matrix that repeats every block for its runs."""
    each = x.shape[-1] // matrices.shape[0] // matrices.shape[-1]
    return x @ torch.block_diag(*(matrix for matrix in matrices for _ in range(each)))


@pytest.mark.parametrize("gradient", ["range", "identity"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", RANGES)
def test_rounding_between_maps_is_the_way_through_both(name, blocks, gradient):
    """Values and gradients agree; those of the rotations tangentially to the orthogonal group."""
    count, k = BLOCKS[blocks]
    upstream, rounding, found = drawn(2, 5, 64, seed=1), StraightThrough([RANGES[name]], gradient), []
    rotations = [torch.stack([random_orthogonal(k, 10 * turn + block) for block in range(count)]) for turn in range(2)]
    for through in (False, True):
        x, s, first, second = (
            tensor.clone().requires_grad_()
            for tensor in (drawn(2, 5, 64) + 0.2, 0.5 + drawn(count, k).abs(), *rotations)
        )
        if through:
            columns = s.repeat_interleave(64 // count // k, 0).flatten()
            mapped = rounding(blockwise(blockwise(x, first) / columns, second))
            z = blockwise(blockwise(mapped, second.mT) * columns, first.mT)
        else:
            z = rounded_between(x, BlockMap().rotated(first).divided(s).rotated(second), rounding)
        z.backward(upstream)
        tangents = [(turned := leaf.detach().mT @ leaf.grad) - turned.mT for leaf in (first, second)]
        found.append([z.detach(), x.grad, s.grad, *tangents])
    assert all(close(ours, wanted, 1e-10) for ours, wanted in zip(*found))
    assert all(wanted.abs().max() > 1e-3 for wanted in found[1])


def test_a_map_that_begins_with_scales_divides_by_them():
    x, s = drawn(3, 32), 0.5 + drawn(2, 8, seed=1).abs()
    scaled = BlockMap().divided(s)
    assert close(blockwise(x, scaled.forward), x / s.repeat_interleave(2, 0).flatten(), 1e-12)
    assert close(blockwise(blockwise(x, scaled.forward), scaled.inverse), x, 1e-12)


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 3.0)])
def test_the_divergence_is_that_of_all_logits_at_once(scale, softcap, chunk, monkeypatch):
    """Values and gradients agree over the likeliest tokens and as cross-entropy."""
    monkeypatch.setattr(head_loss, "CHUNK", chunk)
    head, teacher, where = (
        Head(drawn(40, 16, seed=1), None, scale, softcap),
        *(2 * drawn(11, 40, seed=2)).log_softmax(-1).topk(5),
    )
    token = torch.arange(11).unsqueeze(-1)
    for likeliest, tokens in ((teacher, where), (torch.zeros(11, 1, dtype=torch.float64), token)):
        ours, plain = (drawn(11, 16).requires_grad_() for _ in range(2))
        loss = divergence(ours, head, likeliest, tokens)
        (3 * loss).backward()
        student = head(plain).log_softmax(-1).gather(-1, tokens)
        wanted = (likeliest.exp() * (likeliest - student)).sum(-1).mean()
        (3 * wanted).backward()
        assert close(loss, wanted, 1e-12) and close(ours.grad, plain.grad, 1e-12)
        with torch.no_grad():
            assert torch.equal(divergence(ours, head, likeliest, tokens), loss)
    assert loss.item() == pytest.approx(cross_entropy(head(ours.detach()), token[:, 0]).item(), rel=1e-12)
