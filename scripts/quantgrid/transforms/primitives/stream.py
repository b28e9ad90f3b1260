"""Norms of the residual stream folded into the linears around them: gains, biases, and the mean of LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer


def absorb_norm(layer: DecoderLayer, site: str) -> None:
    """Move gain and bias of the norm before ``site``, if there is one, into its linears.

    A channel of zero gain keeps zero statistics.
    """
    read = layer.plan.sites[site]
    if read.norm is None:
        return
    gain, bias = layer.weights[read.norm], layer.weights.get(f"{read.norm}_bias")
    if bias is not None:
        for linear in read.consumers:
            layer.add_bias(linear, layer.weights[linear] @ bias)
        layer.weights[f"{read.norm}_bias"] = torch.zeros_like(bias)
        layer.shift_input(site, bias)
    for linear in read.consumers:
        layer.weights[linear] = layer.weights[linear] * gain
    layer.weights[read.norm] = torch.ones_like(gain)
    layer.map_input(site, torch.where(gain == 0, 0.0, 1 / gain))


def center_writers(layer: DecoderLayer) -> None:
    """Subtract from what the layer adds to the stream its mean over the channels, instead of in the norms.

    Every LayerNorm becomes an RMSNorm (SliceGPT, arXiv 2401.15024, section 3.2).
    """
    centers = [f"{norm}_center" for norm in layer.plan.norms if f"{norm}_center" in layer.weights]
    if not any(layer.weights[center].any() for center in centers):
        return
    for linear in layer.plan.writers:
        for role in (linear, f"{linear}_bias"):
            if role in layer.weights:
                layer.weights[role] = layer.weights[role] - layer.weights[role].mean(0)
    layer.weights |= {center: torch.zeros_like(layer.weights[center]) for center in centers}


def center_ends(ends: dict[str, Tensor]) -> None:
    """Subtract from every row of embedding and positions its mean; the final LayerNorm becomes an RMSNorm."""
    center = ends.get("final_norm_center")
    if center is None or not center.any():
        return
    for role in ("embedding", "positions"):
        if role in ends:
            ends[role] = ends[role] - ends[role].mean(-1, keepdim=True)
    ends["final_norm_center"] = torch.zeros_like(center)
