"""Storage formats of low-rank factors: bfloat16, or 8-bit or 4-bit codes.

Codes have one float32 scale per component of the term. The left factor is rounded first. Then the
right one is solved again, R = L⁺E, optimal for the rounded left factor under every metric |(E - L
R) M|, and rounded. LQER (arXiv 2402.02446) and CALDERA (2405.18886) round their factors too, in
other formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...quantizer.tensors import QuantizedTensor, quantize
from ...schemes.quant_scheme import QuantScheme

# Schemes are written out: presets may change without a change of any key, so a job must not read
# them.
FACTORS: dict[str, QuantScheme | None] = {
    "bf16": None,
    "fp8": QuantScheme("e4m3"),
    "int8": QuantScheme("int8"),
    "int4": QuantScheme("int4"),
}


def stored_term(
    left: Tensor, right: Tensor, error: Tensor, factors: str
) -> tuple[tuple[Tensor, Tensor], tuple[QuantizedTensor, QuantizedTensor] | None]:
    """Both factors as computed with, and as stored (None for bfloat16; the left one transposed).

    ``left`` (*batch, m, r) and ``right`` (*batch, r, n) for ``error`` (*batch, m, n), all float64;
    ``factors`` names the format.
    """
    wanted = FACTORS[factors]
    if wanted is None:
        return (left.to(torch.bfloat16), right.to(torch.bfloat16)), None
    transposed = quantize(left.mT.float().contiguous(), wanted)
    rounded = transposed.dequantize().mT
    refitted = quantize((torch.linalg.pinv(rounded.double()) @ error).float(), wanted)
    return (rounded.contiguous(), refitted.dequantize()), (transposed, refitted)
