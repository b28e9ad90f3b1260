"""The error of one linear on tokens other than those that its mitigation was told of.

A cell measures the output errors of its linears on the calibration that its mitigation reads. Where a few tokens carry most of a second moment
(attention sinks at the input of a down projection), such an error says nothing about the other tokens: it has to be taken on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .architecture import SITE_OF
from .decoders import DecoderFolder
from .layer_errors import output_square, ratio
from .quantization import Mitigation, decibel
from .quantizer import QuantScheme
from .transforms.composition import Transform, layer_state


def linear_errors(decoder: DecoderFolder, index: int, linears: Sequence[str], transform: Transform, mitigation: Mitigation, scheme: QuantScheme,
                  told: str, measured: Mapping[str, str | Path]) -> dict[str, dict[str, float | None]]:
    """Linear -> signal-to-error ratios in dB of layer ``index``: ``weight``, and the output on each of the calibrations ``measured``.

    ``measured`` maps names to statistics files; ``told`` is the name of the one that the mitigation reads. Inputs are not rounded.
    """
    layers = {}
    for name, path in measured.items():
        layers[name] = layer_state(decoder, index, path)
        transform.fold_layer(layers[name])
    found = {}
    for linear in linears:
        weight, site = layers[told].weights[linear].float(), SITE_OF[linear]
        clipped = layers[told].clips[linear](weight) if linear in layers[told].clips else weight
        error = weight - mitigation(clipped, layers[told].statistics[site], scheme).dequantized()
        found[linear] = {"weight": decibel(ratio(error.square().sum(), weight.square().sum()))}
        for name, layer in layers.items():
            moment = layer.statistics[site].second_moment.float()
            found[linear][name] = decibel(ratio(output_square(error, moment), output_square(weight, moment)))
    return found
