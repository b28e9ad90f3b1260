"""Output error of a linear on tokens outside the calibration set of its mitigation.

A cell measures the output errors of its linears on the calibration set that its mitigation reads.
If a few tokens carry most of a second moment (attention sinks at the input of a down projection),
that error describes those tokens only. Compare it with the error on other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..calibration.layers import DecoderFolder
from ..inference.transform import Transform, layer_state
from ..linalg.quadratic import output_square
from ..schemes.quant_scheme import QuantScheme
from .cached import Mitigation, decibel
from .layer_errors import ratio


def linear_errors(
    decoder: DecoderFolder,
    index: int,
    linears: Sequence[str],
    transform: Transform,
    mitigation: Mitigation,
    scheme: QuantScheme,
    calibration: str,
    measured: Mapping[str, str | Path],
) -> dict[str, dict[str, float | None]]:
    """Signal-to-error ratios in dB of the weight and output of each linear of layer ``index``.

    ``measured`` maps calibrations to statistics files, one output ratio each; ``calibration`` names
    the one that the mitigation reads. Inputs are not rounded. Returns linear -> name -> ratio.
    """
    layers = {}
    for name, path in measured.items():
        layers[name] = layer_state(decoder, index, path)
        transform.fold_layer(layers[name])
    found = {}
    for linear in linears:
        weight, site = layers[calibration].weights[linear].float(), layers[calibration].plan.site_of[linear]
        clipped = layers[calibration].clips[linear](weight) if linear in layers[calibration].clips else weight
        error = weight - mitigation(clipped, layers[calibration].statistics[site], scheme).dequantized()
        found[linear] = {"weight": decibel(ratio(error.square().sum(), weight.square().sum()))}
        for name, layer in layers.items():
            moment = layer.statistics[site].second_moment.float()
            found[linear][name] = decibel(ratio(output_square(error, moment), output_square(weight, moment)))
    return found
